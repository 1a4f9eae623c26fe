"""From (x, s, t) to a velocity or a jump.

    path.py       x_t = alpha data + sigma noise; every conversion, once
    schedule.py   DDPM's noise levels, and the smooth paths through them
    flow_map.py   X(x, s, t) = x + (t - s) v(x, s, t), whose diagonal is the velocity
    log_variance.py  how large errors are at a pair of times
    condition.py  a class or a caption, and what is done to either
    text_encoder.py  captions to embeddings, by any encoder of transformers; prompt_encoder.py: a pipeline's
    denoiser.py   what a network predicts and how that becomes a velocity; classifier-free guidance
    guidance.py   guidance rescaled; autoguidance
    diffflow.py   a learned drift and its way back; path_weight.py: the weight of a path; volatility.py
    neural_flow.py  a learned process that is not simulated; continuous_flow.py: a flow without noise
    bound.py      bounds on the likelihood of a chain; ode_likelihood.py: the density of a flow
    samplers/     from noise to data: one file per method
    pipeline.py   the published pipeline: one file, loaded by stock diffusers
    pretrained.py  a diffusers checkpoint on disk; autoencoder.py, stock_autoencoder.py: latents and back
    two_time_pipeline.py  pipelines of its students; staged_unet.py, unet_stages.py: its U-Net in parts
    backbones/    one file per network; the file's name is its name in a config
t = 0 is data and t = 1 noise; s is the source of a jump and t its target, so generation has t < s.
"""
