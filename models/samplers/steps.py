"""What samplers share: grids of times from noise to data, and the end points that a velocity means."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import Path, shifted

Draw = Callable[[int], Tensor]  # number of a step -> normal noise (B, ...), of each sample its own


def time_grid(num_steps: int, *, shift: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """Return num_steps + 1 times from 1 to 0, u -> shift u / (1 + (shift - 1) u) of an even grid (float64).

    Source: Esser et al., "Scaling rectified flow transformers", 2024, eq. 23; diffusers' flow-map scheduler
    has the same grid.
    """
    _check(num_steps)
    return shifted(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64, device=device), shift)


def noise_grid(
    num_steps: int, path: Path, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return num_steps times where sigma / alpha goes from `high` to `low`, even in its rho-th root, and 0.

    A path that ends with less noise than `high` is gone from its end. Source: Karras et al., 2022, eq. 5.
    """
    _check(num_steps)
    high = min(high, noise_level(path, torch.ones((), dtype=torch.float64)))
    even = torch.linspace(0, 1, max(num_steps, 2), dtype=torch.float64)[:num_steps]
    levels = (high ** (1 / rho) + even * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([path.time(levels.atan()), torch.zeros(1, dtype=torch.float64)])


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")


def steps(grid: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (s, t) of every step as vectors (B,) in the dtype of x."""
    for s, t in zip(grid[:-1], grid[1:], strict=True):
        yield s.to(x.dtype).expand(len(x)), t.to(x.dtype).expand(len(x))


def noise_level(path: Path, t: Tensor) -> float:
    """Return sigma / alpha at a time t (), infinite at pure noise."""
    alpha = path.alpha(t).item()
    return math.inf if abs(alpha) < 1e-12 else path.sigma(t).item() / alpha


def end_points(
    model: Velocity,
    path: Path,
    x: Tensor,
    t: Tensor,
    condition: Condition | None,
    *,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the posterior means (data, noise) that a velocity means at x and the time t ().

    With `clip` the data are kept within [-clip, clip], and the noise is what then explains x.
    """
    times = t.to(x.dtype).expand(len(x))
    data, noise = path.end_points(x, model.velocity(x, times, condition), times, kind="velocity")
    return (data, noise) if clip is None else clipped(path, x, t, data, clip)


def clipped(path: Path, x: Tensor, t: Tensor, data: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return data within [-clip, clip] and the noise that then explains x at the time t ()."""
    data = data.clamp(-clip, clip)
    return data, (x - path.alpha(t) * data) / path.sigma(t)
