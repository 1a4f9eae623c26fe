"""Gamma sampling: jumps of a flow map that go too far, and noise that brings them back.

    x_t = alpha_t / alpha_r X_{s,r}(x) + gamma sigma_t n
    sigma_r / alpha_r = (1 - gamma^2)^(1/2) sigma_t / alpha_t

so that signal and noise of x_t have the spreads of the path, and with an exact map x_t has the path's
distribution for every gamma. gamma = 0 draws no noise: these are the jumps alone. gamma = 1 has r = 0, to the
data and back: the multistep sampling of consistency models. `low` and `high` say at which t noise is drawn.

Restart sampling needs no sampler of its own: from t down to r and up again, K times, is this on a grid that
has the time t K times, as in 1, 0.6, 0.6, 0.6, 0, with the gamma that goes to r.

Source: Kim et al., "Consistency trajectory models", 2024 (gamma sampling); Song et al., "Consistency models",
2023, algorithm 1 (gamma = 1); Xu et al., "Restart sampling", 2023. For any alpha, sigma: our derivation.
"""

import math

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import FlowMap
from ..path import Path
from .jump import jump
from .steps import Draw


@torch.no_grad()
def gamma(
    model: FlowMap,
    noise: Tensor,
    *,
    grid: Tensor,
    path: Path,
    draw: Draw | None = None,
    condition: Condition | None = None,
    gamma: float = 0.5,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Return the data end along `grid`; one evaluation a step. `draw` is needed with gamma > 0."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected a share from 0 (no noise) to 1 (all of it)")
    if gamma and draw is None:
        raise ValueError(f"gamma {gamma} draws noise at each step; give draw, or set gamma to 0")
    x = noise
    for number, (s, t) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        if not gamma or draw is None or t == 0 or not low <= t <= high:
            x = jump(model, x, grid=torch.stack([s, t]), condition=condition)
            continue
        r = path.time((math.sqrt(1 - gamma**2) * path.angle(t).tan()).atan())
        x = jump(model, x, grid=torch.stack([s, r]), condition=condition)
        x = path.alpha(t) / path.alpha(r) * x + gamma * path.sigma(t) * draw(number).to(x.dtype)
    return x
