"""Euler's method: x <- x + (t - s) b(x, s)."""

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import expand
from .steps import steps


@torch.no_grad()
def euler(model: Velocity, noise: Tensor, *, grid: Tensor, condition: Condition | None = None) -> Tensor:
    """Return the data end of Euler's method along `grid`; order 1, one velocity a step."""
    x = noise
    for s, t in steps(grid, x):
        x = x + expand(t - s, x) * model.velocity(x, s, condition)
    return x
