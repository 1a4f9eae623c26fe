"""Paths between data and noise: x_t = alpha(t) data + sigma(t) noise, with t = 0 data and t = 1 noise.

Every conversion of the field stands here, once. Whatever a network predicts becomes the pair (data, noise),
and everything else follows from the pair: the state by `Path.state`, the velocity by `Path.velocity`.
Times have shape (B,) and are in [0, 1]; data, noise and states have shape (B, ...).

A network predicts one of
    velocity   alpha' data + sigma' noise: dx/dt
    noise      DDPM's eps
    data       DDPM's x0
    v          (a noise - sigma data / data_std) / r,  a = alpha data_std,  r^2 = a^2 + sigma^2
The last is the velocity along the quarter circle through data of unit variance and noise, so that the network
has a target of unit variance at all times, and sees the state at unit variance, x / r. With data_std = 1 on a
variance-preserving path it is the v of progressive distillation. For every data_std it is EDM's
preconditioning: c_in, c_skip, c_out are 1 / r, a / r and -sigma / r for x, data and v at unit variance; only
the sign of EDM's network is the other one.

Source: Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, eq. 2.1; Lipman et al. 2023, eq.
10; v: Salimans and Ho, "Progressive distillation", 2022, section 4; Karras et al., "Elucidating the design
space of diffusion-based generative models" (EDM), 2022, table 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "noise", "data", "v"]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Return t (B,) with trailing axes of length one, so that it multiplies `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim()))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return shift t / (1 + (shift - 1) t): where sigma / alpha of the linear path is `shift` times more.

    Source: Esser et al., "Scaling rectified flow transformers", 2024, eq. 23.
    """
    return shift * t / (1 + (shift - 1) * t)


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

    def angle(self, t: Tensor) -> Tensor:
        """Return atan(sigma / alpha) in [0, pi / 2]: the noise level, whatever the scale of the state."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def time(self, angle: Tensor) -> Tensor:
        """Return the time at which the path has an angle, the inverse of `angle`."""
        raise NotImplementedError

    def snr(self, t: Tensor) -> Tensor:
        """Return the ratio of the variances of signal and noise, alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def log_snr_dot(self, t: Tensor) -> Tensor:
        """Return d log(alpha^2 / sigma^2) / dt, which is negative."""
        return 2 * (self.alpha_dot(t) / self.alpha(t) - self.sigma_dot(t) / self.sigma(t))

    def on_grid(self, t: Tensor) -> Tensor:
        """Return the times of t (B,) at which a network is trained: t itself, unless the path is discrete."""
        return t

    def scale(self, t: Tensor, *, data_std: float = 1.0) -> Tensor:
        """Return r = ((alpha data_std)^2 + sigma^2)^(1/2): the state's spread if the data's is data_std."""
        return torch.hypot(self.alpha(t) * data_std, self.sigma(t))

    def target(
        self, data: Tensor, noise: Tensor, t: Tensor, *, kind: Prediction, data_std: float = 1.0
    ) -> Tensor:
        """Return what a network of the given kind is to predict (B, ...)."""
        if kind == "velocity":
            return self.velocity(data, noise, t)
        if kind == "v":
            r = self.scale(t, data_std=data_std)
            a, sigma = self.alpha(t) * data_std / r, self.sigma(t) / r
            return expand(a, data) * noise - expand(sigma / data_std, data) * data
        return noise if kind == "noise" else data

    def noise_error(self, t: Tensor, *, kind: Prediction, data_std: float = 1.0) -> Tensor:
        """Return the error of the noise (B,) that an error of 1 in a prediction makes, by magnitude."""
        if kind == "noise":
            return torch.ones_like(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if kind == "data":
            return alpha / sigma
        if kind == "v":
            return alpha * data_std / self.scale(t, data_std=data_std)
        return alpha / (alpha * self.sigma_dot(t) - self.alpha_dot(t) * sigma)

    def end_points(
        self, x: Tensor, prediction: Tensor, t: Tensor, *, kind: Prediction, data_std: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return (data, noise) that explain the state x and a prediction of the given kind at t.

        A noise prediction needs alpha > 0; the others are legal on the whole of [0, 1]. At t = 0 the state
        says nothing of the noise, whose mean is 0.
        """
        alpha, sigma = expand(self.alpha(t), x), expand(self.sigma(t), x)
        if kind == "data":
            noisy = sigma > 0
            return prediction, torch.where(noisy, x - alpha * prediction, 0) / torch.where(noisy, sigma, 1)
        if kind == "noise":
            return (x - sigma * prediction) / alpha, prediction
        if kind == "v":
            r = expand(self.scale(t, data_std=data_std), x)
            a, sigma = alpha * data_std / r, sigma / r
            data, noise = a * (x / r) - sigma * prediction, sigma * (x / r) + a * prediction
            return data_std * data, noise
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

    def time(self, angle: Tensor) -> Tensor:
        """Return sin / (sin + cos): the ratio sigma / alpha = t / (1 - t) of noise to signal, inverted."""
        return angle.sin() / (angle.sin() + angle.cos())


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

    def time(self, angle: Tensor) -> Tensor:
        """Return 2 angle / pi."""
        return angle * (2 / math.pi)


@dataclass(frozen=True)
class LogLinear(Path):
    """The straight path with noise in even steps of its logarithm: alpha = 1 - t, sigma = least^(1 - t).

    At t = 0 there is the noise `least` already, so that likelihoods along it are finite. Source: Bartosh et
    al., "Neural flow diffusion models", 2024.
    """

    name: Literal["log_linear"] = "log_linear"
    least: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise ValueError(f"least is {self.least}, expected a share between 0 and 1, such as 0.01")

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return least^(1 - t)."""
        return self.least ** (1 - t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return -log(least) sigma."""
        return -math.log(self.least) * self.sigma(t)

    def time(self, angle: Tensor) -> Tensor:
        """Return the time of an angle, 0 for those before the first one.

        With c = -log(least) and w = c (1 - t) it is the root of w + log(w) = log(c / tan(angle)).
        """
        c = -math.log(self.least)
        wanted = math.log(c) - angle.double().clamp(math.atan(self.least), math.pi / 2).tan().log()
        w = torch.nn.functional.softplus(wanted)
        for _ in range(6):  # Newton, from a start that is near on both sides
            w = w * (1 + wanted - w.log()) / (1 + w)
        return (1 - w / c).clamp(0, 1).to(angle.dtype)
