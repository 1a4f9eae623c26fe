"""From (x, s, t) to a velocity or a jump.

    path.py       x_t = alpha data + sigma noise; every conversion, once
    flow_map.py   X(x, s, t) = x + (t - s) v(x, s, t), whose diagonal is the velocity
    denoiser.py   what a network predicts and how that becomes a velocity; guidance
    sampler.py    Euler and Heun steps of a velocity, jumps of a flow map
    pipeline.py   the published pipeline: one file, loaded by stock diffusers
    backbones/    one file per network; the file's name is its name in a config
t = 0 is data and t = 1 noise; s is the source of a jump and t its target, so generation has t < s.
"""
