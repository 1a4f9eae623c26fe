"""Paths between data and noise: x_t = alpha(t) data + sigma(t) noise, with t = 0 data and t = 1 noise.

Every conversion of the field stands here, once. Whatever a network predicts becomes the pair (data, noise),
and everything else follows from the pair: the state by `Path.state`, the velocity by `Path.velocity`.
Times have shape (B,) and are in [0, 1]; data, noise and states have shape (B, ...).

Source: Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, eq. 2.1; Lipman et al. 2023, eq.
10.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "noise", "data"]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Return t (B,) with trailing axes of length one, so that it multiplies `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim()))


@dataclass(frozen=True)
class Path:
    """A pair of coefficients (alpha, sigma) with their derivatives; a subclass gives the four functions."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the coefficient of the data at t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Return the coefficient of the noise at t."""
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""
        raise NotImplementedError

    def state(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha data + sigma noise."""
        return expand(self.alpha(t), data) * data + expand(self.sigma(t), data) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return dx_t/dt = alpha' data + sigma' noise."""
        return expand(self.alpha_dot(t), data) * data + expand(self.sigma_dot(t), data) * noise

    def end_points(
        self, x: Tensor, prediction: Tensor, t: Tensor, *, kind: Prediction
    ) -> tuple[Tensor, Tensor]:
        """Return (data, noise) that explain the state x and a prediction of the given kind at t.

        A data prediction needs sigma > 0 (t > 0), a noise prediction alpha > 0 (t < 1); a velocity is
        legal on the whole of [0, 1].
        """
        alpha, sigma = expand(self.alpha(t), x), expand(self.sigma(t), x)
        if kind == "data":
            return prediction, (x - alpha * prediction) / sigma
        if kind == "noise":
            return (x - sigma * prediction) / alpha, prediction
        alpha_dot, sigma_dot = expand(self.alpha_dot(t), x), expand(self.sigma_dot(t), x)
        determinant = alpha * sigma_dot - alpha_dot * sigma
        data = (sigma_dot * x - sigma * prediction) / determinant
        noise = (alpha * prediction - alpha_dot * x) / determinant
        return data, noise


@dataclass(frozen=True)
class Linear(Path):
    """The straight path of flow matching: alpha = 1 - t, sigma = t."""

    name: Literal["linear"] = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Trig(Path):
    """The variance-preserving quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name: Literal["trig"] = "trig"

    def alpha(self, t: Tensor) -> Tensor:
        """Return cos(pi t / 2)."""
        return torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sin(pi t / 2)."""
        return torch.sin(t * math.pi / 2)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -(pi / 2) sin(pi t / 2)."""
        return -torch.sin(t * math.pi / 2) * (math.pi / 2)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return (pi / 2) cos(pi t / 2)."""
        return torch.cos(t * math.pi / 2) * (math.pi / 2)
