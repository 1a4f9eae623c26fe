"""The chain of a DiffFlow from noise to data: x_s ~ p(x_s | x_t), one call of its networks a step.

The last step, to t = 0, is the mean alone. An even grid stands for the model's own of as many steps, which is
the one that it was trained on.

Source: Zhang and Chen, "Diffusion normalizing flow", 2021, eq. 12.
"""

import torch
from torch import Tensor

from ..condition import Condition
from ..diffflow import DiffFlow
from ..flow_map import Velocity
from ..path import expand
from .steps import Draw, time_grid


@torch.no_grad()
def backward(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    draw: Draw,
    condition: Condition | None = None,
) -> Tensor:
    """Return the data end (B, ...) of the chain along `grid`, with the noise of each step from `draw`."""
    if not isinstance(model, DiffFlow):
        raise ValueError("the sampler backward is the chain of a diffflow, unguided; take euler or heun here")
    if torch.equal(grid, time_grid(len(grid) - 1, device=grid.device)):
        grid = model.grid(len(grid) - 1).flip(0).to(grid.device)
    x, times = noise.double(), grid.double()[:, None].expand(-1, len(noise))
    for number, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        said = model.say(x, t, condition, dtype=noise.dtype)
        x, std = model.reverse_step(x, said, s, t)
        if grid[number + 1] > 0:
            widening = model.log_widening(said, s, t)
            spread = expand(std, x) if widening is None else expand(std, x) * widening.exp()
            x = x + spread * draw(number).double()
    return x.to(noise.dtype)
