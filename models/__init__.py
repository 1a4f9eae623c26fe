"""From (x, s, t) to a velocity or a jump.

    path.py       x_t = alpha data + sigma noise; every conversion, once
    schedule.py   DDPM's noise levels, and the smooth paths through them
    flow_map.py   X(x, s, t) = x + (t - s) v(x, s, t), whose diagonal is the velocity
    log_variance.py  how large errors are at a pair of times
    condition.py  a class or a caption, and what is done to either
    text_encoder.py  captions to embeddings, by any encoder of transformers
    denoiser.py   what a network predicts and how that becomes a velocity; classifier-free guidance
    guidance.py   guidance rescaled; autoguidance
    bound.py      bounds on the likelihood of a chain; ode_likelihood.py: the density of a flow
    samplers/     from noise to data: one file per method
    pipeline.py   the published pipeline: one file, loaded by stock diffusers
    backbones/    one file per network; the file's name is its name in a config
t = 0 is data and t = 1 noise; s is the source of a jump and t its target, so generation has t < s.
"""
