"""DDPM's ancestral sampler: x_t ~ N(mean of q(x_t | x_s, data), variance), at the data predicted from x_s.

    mean     = alpha_t data + (var_t - var~)^(1/2) noise
    forward  : var_{s|t} = var_s - (alpha_s / alpha_t)^2 var_t, beta of a variance-preserving step
    posterior: var~      = var_{s|t} var_t / var_s,   var = sigma^2

on any grid and path; on the steps n / N of a discrete path it is DDPM itself, on others the respaced chain.
The last step, to t = 0, is the mean alone.

Source: Ho et al., 2020, algorithm 2 and section 3.2; respacing: Nichol and Dhariwal, 2021, section 4.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..bound import Variance
from ..condition import Condition
from ..denoiser import Denoiser, learned_log_variance
from ..flow_map import Velocity
from ..path import Path
from .steps import Draw, clipped, end_points


def step_variances(path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances () of x_s given x_t, and of x_t given x_s and the data, for t < s."""
    before, now = path.sigma(t).square(), path.sigma(s).square()
    forward = now - (path.alpha(s) / path.alpha(t)).square() * before
    return forward, forward * before / now


@torch.no_grad()
def ddpm(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    path: Path,
    draw: Draw,
    condition: Condition | None = None,
    variance: Variance | Literal["learned"] = "fixed_small",
    clip: float | None = None,
) -> Tensor:
    """Return the data end of the chain, with the noise of each step from `draw`; one velocity a step.

    `variance`: the posterior's ("fixed_small"), the forward step's ("fixed_large"), or between them, as the
    network says where it has learned to.
    """
    known = (*get_args(Variance), "learned")
    if variance not in known:
        raise ValueError(f"variance is {variance!r}, expected one of {', '.join(known)}")
    x = noise
    for number, (s, t) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        forward, posterior = step_variances(path, s, t)
        spread = (forward if variance == "fixed_large" else posterior).sqrt()
        if variance == "learned":
            data, said, f = _with_variance(model, x, s, condition)
            spread = (learned_log_variance(f, forward, posterior) / 2).exp() if t > 0 else spread
            data, said = (data, said) if clip is None else clipped(path, x, s, data, clip)
        else:
            data, said = end_points(model, path, x, s, condition, clip=clip)
        x = path.alpha(t) * data + (path.sigma(t).square() - posterior).sqrt() * said
        if t > 0:
            x = x + spread * draw(number).to(x.dtype)
    return x


def _with_variance(
    model: Velocity, x: Tensor, s: Tensor, condition: Condition | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, noise and f, which says the variance, of one evaluation of a network at the time s ()."""
    times = s.to(x.dtype).expand(len(x))
    said = model.predict(x, times, times, condition) if isinstance(model, Denoiser) else x
    prediction, f = said[:, : x.shape[1]], said[:, x.shape[1] :]
    if not isinstance(model, Denoiser) or not f.shape[1]:
        raise ValueError("this model has learned no variance, or is guided; set variance to fixed_small")
    kind, data_std = model.prediction, model.data_std
    return *model.path.end_points(x, prediction, times, kind=kind, data_std=data_std), f
