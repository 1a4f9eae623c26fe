"""Jumps of a flow map: x <- X_{s,t}(x), exact in any number of steps if the map is."""

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import FlowMap
from .steps import steps


@torch.no_grad()
def jump(model: FlowMap, noise: Tensor, *, grid: Tensor, condition: Condition | None = None) -> Tensor:
    """Return the data end of the chain x <- X_{s,t}(x) along `grid`; one evaluation a step."""
    x = noise
    for s, t in steps(grid, x):
        x = model.jump(x, s, t, condition)
    return x
