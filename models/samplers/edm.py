"""EDM's sampler: Heun's method in the noise level r = sigma / alpha, with noise added before each step.

    r^ = r (1 + min(churn / N, 2^(1/2) - 1)) where low <= r <= high, else r
    y^ = y + (r^2^ - r^2)^(1/2) spread n,    y = x / alpha,    dy/dr = E[noise | x]

so that the network is asked at the noise level r^. Without churn it is deterministic, of order 2.

Source: Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, algorithm 2.
"""

import math

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import Path
from .steps import Draw, end_points, noise_level


@torch.no_grad()
def edm(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    path: Path,
    draw: Draw | None = None,
    condition: Condition | None = None,
    churn: float = 0.0,
    low: float = 0.0,
    high: float = math.inf,
    spread: float = 1.0,
) -> Tensor:
    """Return the data end along `grid`, such as `noise_grid`; two velocities a step, one in the last to 0.

    `draw` is needed with churn > 0. On a path that ends in pure noise the grid has to start before t = 1.
    """
    if churn and draw is None:
        raise ValueError(f"churn {churn} draws noise at each step; give draw, or set churn to 0")
    levels = [noise_level(path, t) for t in grid]
    if math.isinf(levels[0]):
        raise ValueError("the noise level is infinite at the first time; give noise_grid, or start before 1")

    def slope(y: Tensor, r: float) -> Tensor:
        t = path.time(torch.tensor(r, dtype=torch.float64, device=y.device).atan())
        return end_points(model, path, path.alpha(t) * y, t, condition)[1]

    most = noise_level(path, torch.ones_like(grid[0]))
    y = levels[0] * noise
    for number, (r, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if churn and draw is not None and low <= r <= high:
            raised = min(r * (1 + min(churn / (len(grid) - 1), math.sqrt(2) - 1)), most)
            y, r = y + math.sqrt(raised**2 - r**2) * spread * draw(number).to(y.dtype), raised
        first = slope(y, r)
        ahead = y + (after - r) * first
        y = ahead if after == 0 else y + (after - r) * (first + slope(ahead, after)) / 2
    return path.alpha(grid[-1]) * y
