"""DDPM's schedules: N noise levels abar_1 > ... > abar_N, and the smooth path through them.

    x_n = sqrt(abar_n) data + sqrt(1 - abar_n) noise,   abar_n = (1 - beta_1) ... (1 - beta_n),   t = n / N

Step n stands at the time n / N, so that t = 0 is data and t = 1 the last step. Every variance-preserving path
is the quarter circle at a speed of its own: alpha = cos(angle), sigma = sin(angle). The angles of the N
levels and of the data (0) are joined by a monotone cubic with a continuous slope: one network is thus the
chain of its N steps and a velocity on the whole of [0, 1], with no infinite coefficient at either end.

A path that does not end in pure noise (abar_N > 0) is sampled from N(0, I) all the same, as DDPM is. Rescaled
to zero terminal signal-to-noise it does end there, and then a network has to predict v or the data:
the noise alone says nothing of the data at t = 1.

Source: Ho et al., "Denoising diffusion probabilistic models", 2020, eq. 4; the cubic: Fritsch and Carlson,
1980, as scipy has it.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from .path import Path


@dataclass(frozen=True)
class Discrete(Path):
    """A variance-preserving path through `num_steps` noise levels; a subclass gives the betas."""

    num_steps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 2")
        betas = self.own_betas()
        if not (0 < betas.min() and betas.max() < 1):
            raise ValueError(
                f"the betas of {self.num_steps} steps go from {betas.min():.3g} to {betas.max():.3g}, "
                "expected numbers between 0 and 1; take more steps or smaller betas"
            )

    def own_betas(self) -> np.ndarray:
        """Return beta_1 .. beta_N (N,), before a rescaling to zero terminal signal."""
        raise NotImplementedError

    @property
    def alpha_bar(self) -> Tensor:
        """The levels abar_1 .. abar_N (N,), in float64."""
        return torch.tensor(_alpha_bar(self))

    @property
    def betas(self) -> Tensor:
        """The variances beta_1 .. beta_N (N,) of the chain's steps, in float64."""
        levels = _alpha_bar(self)
        return torch.from_numpy(1 - levels / np.concatenate([[1.0], levels[:-1]]))

    @property
    def posterior_variance(self) -> Tensor:
        """The variances of q(x_{n-1} | x_n, data), beta_n (1 - abar_{n-1}) / (1 - abar_n); 0 at n = 1."""
        levels = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar])
        return self.betas * (1 - levels[:-1]) / (1 - levels[1:])

    def on_grid(self, t: Tensor) -> Tensor:
        """Return the first of the times 1 / N, 2 / N, ..., 1 that is not before t, up to a rounding error."""
        return (t * self.num_steps - 1e-3).ceil().clamp(min=1) / self.num_steps

    def angle(self, t: Tensor) -> Tensor:
        """Return the angle of the quarter circle at t."""
        (c3, c2, c1, c0), u = self._cubic(t)
        return (((c3 * u + c2) * u + c1) * u + c0).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        """Return cos(angle)."""
        return self.angle(t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        """Return sin(angle)."""
        return self.angle(t).sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -sin(angle) d angle / dt."""
        return -self.angle(t).sin() * self._speed(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return cos(angle) d angle / dt."""
        return self.angle(t).cos() * self._speed(t)

    def time(self, angle: Tensor) -> Tensor:
        """Return the time at which the path has an angle; 1 for angles beyond its end."""
        coefficients, angles = _cubics(self)
        knots = torch.as_tensor(angles, device=angle.device)
        wanted = angle.double().clamp(0, angles[-1])
        cell = (torch.searchsorted(knots, wanted) - 1).clamp(0, self.num_steps - 1)
        c3, c2, c1, c0 = torch.as_tensor(coefficients, device=angle.device)[:, cell]
        u = (wanted - knots[cell]) / (knots[cell + 1] - knots[cell]) / self.num_steps
        for _ in range(8):  # Newton: each step doubles the digits, and a cell is nearly straight
            excess = ((c3 * u + c2) * u + c1) * u + c0 - wanted
            u = (u - excess / ((3 * c3 * u + 2 * c2) * u + c1)).clamp(0, 1 / self.num_steps)
        return (cell.double() / self.num_steps + u).to(angle.dtype)

    def _speed(self, t: Tensor) -> Tensor:
        """Return d angle / dt."""
        (c3, c2, c1, _), u = self._cubic(t)
        return ((3 * c3 * u + 2 * c2) * u + c1).to(t.dtype)

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients (4, B) of the cubic at t, highest first, and the time since its start."""
        precise = t.double()
        cell = (precise * self.num_steps).floor().long().clamp(0, self.num_steps - 1)
        coefficients = torch.as_tensor(_cubics(self)[0], device=t.device)
        return coefficients[:, cell], precise - cell.double() / self.num_steps


@dataclass(frozen=True)
class LinearBetas(Discrete):
    """Betas in even steps. `first` and `last` are those of 1000 steps; N steps have 1000 / N times as much.

    Source: Ho et al., 2020, section 4; the factor: Nichol and Dhariwal, 2021.
    """

    name: Literal["linear_betas"] = "linear_betas"
    first: float = 1e-4
    last: float = 0.02

    def own_betas(self) -> np.ndarray:
        """Return beta_1 .. beta_N (N,)."""
        return np.linspace(self.first, self.last, self.num_steps) * (1000 / self.num_steps)


@dataclass(frozen=True)
class ScaledLinearBetas(Discrete):
    """Betas whose square roots go in even steps; the defaults are Stable Diffusion's.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022, appendix.
    """

    name: Literal["scaled_linear_betas"] = "scaled_linear_betas"
    first: float = 0.00085
    last: float = 0.012

    def own_betas(self) -> np.ndarray:
        """Return beta_1 .. beta_N (N,)."""
        return np.linspace(self.first**0.5, self.last**0.5, self.num_steps) ** 2 * (1000 / self.num_steps)


@dataclass(frozen=True)
class Cosine(Discrete):
    """abar_n = f(n / N) / f(0), f(u) = cos^2((u + offset) / (1 + offset) pi / 2); a beta is at most `limit`.

    Source: Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17.
    """

    name: Literal["cosine"] = "cosine"
    offset: float = 0.008
    limit: float = 0.999

    def own_betas(self) -> np.ndarray:
        """Return beta_1 .. beta_N (N,)."""
        u = np.linspace(0, 1, self.num_steps + 1)
        f = np.cos((u + self.offset) / (1 + self.offset) * (math.pi / 2)) ** 2
        return np.minimum(1 - f[1:] / f[:-1], self.limit)


@functools.cache
def _alpha_bar(schedule: Discrete) -> np.ndarray:
    """Return abar_1 .. abar_N; with zero terminal signal their roots are shifted to 0 and stretched back.

    Source of the shift: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2024,
    algorithm 1.
    """
    levels = np.cumprod(1 - schedule.own_betas())
    if schedule.zero_terminal_snr:
        roots = np.sqrt(levels)
        levels = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return levels


@functools.cache
def _cubics(schedule: Discrete) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients (4, N) of the cubics between 0, 1 / N, ..., 1, and the angles (N + 1,)."""
    levels = np.concatenate([[1.0], _alpha_bar(schedule)])
    angles = np.arctan2(np.sqrt(1 - levels), np.sqrt(levels))
    return PchipInterpolator(np.linspace(0, 1, len(angles)), angles).c, angles
