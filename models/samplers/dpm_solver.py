"""DPM-Solver++(2M): exact in all but the data predicted, which go on in a line of log(alpha / sigma).

    x_t = sigma_t / sigma_s x_s + (alpha_t - sigma_t alpha_s / sigma_s) D
    D   = data_s + h / (2 h') (data_s - data_s'),   h = log(alpha_t / sigma_t) - log(alpha_s / sigma_s)

with h' and data_s' of the step before. The first step, and those that start or end where the logarithm is
infinite (pure noise, pure data), take D = data_s.

Source: Lu et al., "DPM-Solver++: fast solver for guided sampling", 2022, algorithm 2.
"""

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import Path
from .steps import end_points


@torch.no_grad()
def dpm_solver(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    path: Path,
    condition: Condition | None = None,
    clip: float | None = None,
) -> Tensor:
    """Return the data end along `grid`; order 2, one velocity a step."""
    level = -path.angle(grid).tan().log()
    x, before = noise, None
    for number, (s, t) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        data, _ = end_points(model, path, x, s, condition, clip=clip)
        h, ahead = level[number + 1] - level[number], data
        if before is not None and h.isfinite():
            ahead = data + h / (2 * (level[number] - level[number - 1])) * (data - before)
        kept = path.sigma(t) / path.sigma(s)
        x = kept * x + (path.alpha(t) - kept * path.alpha(s)) * ahead
        before = data
    return x
