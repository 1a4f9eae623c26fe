"""DDIM: x_t = alpha_t data + sigma_t noise, with the data and the noise predicted from x_s.

Of the noise a part of variance eta^2 var~ is drawn anew, where var~ is that of DDPM's step: eta = 0 is an
exact step of the flow for data and noise that stay as they are, eta = 1 is DDPM with the small variance.

Source: Song, Meng and Ermon, "Denoising diffusion implicit models", 2021, eqs. 12 and 16.
"""

import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import Path
from .ddpm import step_variances
from .steps import Draw, end_points


@torch.no_grad()
def ddim(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    path: Path,
    condition: Condition | None = None,
    eta: float = 0.0,
    draw: Draw | None = None,
    clip: float | None = None,
) -> Tensor:
    """Return the data end along `grid`; order 1, one velocity a step. `draw` is needed with eta > 0."""
    if eta and draw is None:
        raise ValueError(f"eta {eta} draws noise at each step; give draw, or set eta to 0")
    x = noise
    for number, (s, t) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        data, said = end_points(model, path, x, s, condition, clip=clip)
        drawn = eta**2 * step_variances(path, s, t)[1]
        x = path.alpha(t) * data + (path.sigma(t).square() - drawn).sqrt() * said
        if draw is not None and eta and t > 0:
            x = x + drawn.sqrt() * draw(number).to(x.dtype)
    return x
