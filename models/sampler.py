"""Samplers: from noise at t = 1 to data at t = 0, by steps of a velocity or by jumps of a flow map."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .flow_map import FlowMap, Velocity
from .path import expand


def time_grid(num_steps: int, *, shift: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """Return num_steps + 1 times from 1 to 0, u -> shift u / (1 + (shift - 1) u) of an even grid (float64).

    Source: Esser et al., "Scaling rectified flow transformers", 2024, eq. 23; diffusers' flow-map scheduler
    has the same grid.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    even = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64, device=device)
    return shift * even / (1 + (shift - 1) * even)


def _steps(grid: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (s, t) of every step as vectors (B,) in the dtype of x."""
    for s, t in zip(grid[:-1], grid[1:], strict=True):
        yield s.to(x.dtype).expand(len(x)), t.to(x.dtype).expand(len(x))


@torch.no_grad()
def jump(model: FlowMap, noise: Tensor, *, grid: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the data end of the chain x <- X_{s,t}(x) along `grid`; one evaluation a step."""
    x = noise
    for s, t in _steps(grid, x):
        x = model.jump(x, s, t, condition)
    return x


@torch.no_grad()
def euler(model: Velocity, noise: Tensor, *, grid: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the data end of Euler's method, x <- x + (t - s) b(x, s); order 1, one velocity a step."""
    x = noise
    for s, t in _steps(grid, x):
        x = x + expand(t - s, x) * model.velocity(x, s, condition)
    return x


@torch.no_grad()
def heun(model: Velocity, noise: Tensor, *, grid: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the data end of Heun's method, the mean of the velocities at both ends; order 2, two a step."""
    x = noise
    for s, t in _steps(grid, x):
        first = model.velocity(x, s, condition)
        second = model.velocity(x + expand(t - s, x) * first, t, condition)
        x = x + expand(t - s, x) * (first + second) / 2
    return x
