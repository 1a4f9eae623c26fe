"""Heun's method: x <- x + (t - s) (b(x, s) + b(x', t)) / 2, where x' is Euler's step."""

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import expand
from .steps import steps


@torch.no_grad()
def heun(model: Velocity, noise: Tensor, *, grid: Tensor, condition: Condition | None = None) -> Tensor:
    """Return the data end of Heun's method, the mean of the velocities at both ends; order 2, two a step."""
    x = noise
    for s, t in steps(grid, x):
        first = model.velocity(x, s, condition)
        second = model.velocity(x + expand(t - s, x) * first, t, condition)
        x = x + expand(t - s, x) * (first + second) / 2
    return x
