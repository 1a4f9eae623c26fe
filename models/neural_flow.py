"""A diffusion whose forward process is learned, without simulating it.

The state of data x at the time t is x_t = F(noise, t, x), F affine in the noise and so invertible in it:

    x_t = mu(x, t) + sigma(x, t) noise
    mu = alpha(t) x + sum_k phi_k(t) m_k(x)
    log sigma = log sigma_0(t) + sum_k phi_k(t) l_k(x)
    phi_k(t) = t (1 - t) (2 t - 1)^k,   k = 0 .. K - 1

with (alpha, sigma_0) the path log_linear. A small network says all m_k and l_k of x in one call; the time is
outside of it, so derivatives in time are written out. As phi_k(0) = phi_k(1) = 0 the process begins at x with
the path's least noise and ends in pure noise, whatever is learned.

With a volatility g(t) the process and its reversal are stochastic differential equations. The model takes
the reversal's drift at the data that its network predicts, and its path falls behind the process by

    b(x_t, t, x) = dF/dt - g^2 / 2 score = mu' + sigma' noise + g^2 / (2 sigma) noise
    -log p(x) <= L_1 + int_0^1 E |b(x_t, t, x) - b(x_t, t, predicted)|^2 / (2 g^2) dt + L_0
    L_1 = KL( q(x_1 | x) || N(0, I) ),   L_0 = -log p(x | x_0),   p(x | x_0) = N(x_0, sigma_0(0)^2 I)

in nats, where both b are at the same x_t, each with the noise that then explains it. g belongs to the path,

    g^2 = sigma_0^2 d log(sigma_0^2 / alpha^2) / dt,

for which, without m and l, the integrand is that of a variational diffusion model and no other g has a
smaller one; where it is learned it starts there. A constant g costs many nats.

The model's flow is dx/dt = mu' + sigma' noise at the data predicted.

Sources: Bartosh, Vetrov and Naesseth, "Neural flow diffusion models", 2024; Kingma et al., "Variational
diffusion models", 2021; polynomials in time: Sahoo et al., "Diffusion models with learned adaptive noise"
(MuLAN), 2024.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .bound import gaussian
from .condition import Condition
from .flow_map import FlowMap
from .log_variance import LogVariance
from .path import LogLinear, expand

MOST_WIDENING = 4.0  # of l_k, by magnitude, and of the logarithm of what g^2 is multiplied by
NEAR = 1e-4  # a gap of times that is a derivative


class Marginal(NamedTuple):
    """q(x_t | x) = N(mean, std^2), each dimension by itself, and its derivatives in time; all (B, ...)."""

    mean: Tensor
    std: Tensor
    mean_dot: Tensor
    std_dot: Tensor

    def state(self, noise: Tensor) -> Tensor:
        """Return F(noise) (B, ...)."""
        return self.mean + self.std * noise

    def noise(self, state: Tensor) -> Tensor:
        """Return the noise (B, ...) that leads to a state."""
        return (state - self.mean) / self.std

    def velocity(self, noise: Tensor) -> Tensor:
        """Return dF/dt (B, ...) at a noise that stays."""
        return self.mean_dot + self.std_dot * noise

    def reverse_drift(self, noise: Tensor, square: Tensor) -> Tensor:
        """Return b (B, ...) at F(noise), for g^2 = `square` (B,)."""
        return self.velocity(noise) + expand(square / 2, noise) * noise / self.std


class Transform(nn.Module):
    """The network of m_k and l_k: layers of points (B, D), 3 x 3 convolutions of pictures (B, C, H, W).

    At birth all are 0, and the process is the path's.
    """

    def __init__(self, sample_shape: tuple[int, ...], *, order: int, width: int, depth: int) -> None:
        super().__init__()
        channels, *space = sample_shape
        layer = partial(nn.Conv2d, kernel_size=3, padding=1) if space else nn.Linear
        hidden = pairwise([channels, *[width] * depth])
        layers = [part for sizes in hidden for part in (layer(*sizes), nn.SiLU())]
        last = layer(width, 2 * order * channels)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers, last)
        self.shape = (2, order, channels)

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and l (B, K, ...) of data (B, ...), in the precision of the weights."""
        with torch.autocast(data.device.type, enabled=False):
            said = self.layers(data.to(next(self.parameters()).dtype)).unflatten(1, self.shape)
            shift, widening = said.unbind(1)
            return shift, MOST_WIDENING * torch.tanh(widening / MOST_WIDENING)


class LearnedFlow(FlowMap):
    """A generator that reverses a learned forward process; its backbone says the data, by v at unit scale.

    `transform` None is a process that is the path, `volatility` None one that is tied to the path.
    `least_volatility` is added in squares, so that nothing is divided by 0.
    """

    path: LogLinear

    def __init__(
        self,
        backbone: nn.Module,
        path: LogLinear,
        *,
        transform: Transform | None = None,
        volatility: LogVariance | None = None,
        least_volatility: float = 1e-3,
        data_std: float = 1.0,
    ) -> None:
        super().__init__(backbone, path)
        self.transform, self.volatility = transform, volatility
        self.least_volatility, self.data_std = least_volatility, data_std

    @classmethod
    def of(cls, backbone: nn.Module, means: dict[str, Any]) -> Self:
        """Return the model of a backbone that was trained for `means`, the settings of the objective."""
        shape: Any = backbone.sample_shape
        return cls(
            backbone,
            LogLinear(**means["path"]),
            transform=Transform(shape, **means["transform"]) if means["transform"] else None,
            volatility=LogVariance() if means["volatility"] == "learned" else None,
            least_volatility=means["least_volatility"],
            data_std=means["data_std"],
        )

    def marginal(self, data: Tensor, t: Tensor) -> Marginal:
        """Return q(x_t | data) for data (B, ...) and times t (B,), in the precision of the data."""
        t, path = t.double(), self.path
        sigma = path.sigma(t)
        coefficients = path.alpha(t), path.alpha_dot(t), sigma.log(), path.sigma_dot(t) / sigma
        alpha, alpha_dot, log_std, log_std_dot = (expand(each.to(data.dtype), data) for each in coefficients)
        mean, mean_dot = alpha * data, alpha_dot * data
        if self.transform is not None:
            shift, widening = (each.to(data.dtype) for each in self.transform(data))
            bends = (bend.to(data.dtype) for bend in polynomials(t, shift.shape[1]))
            phi, phi_dot = (bend.reshape(*bend.shape, *[1] * (data.dim() - 1)) for bend in bends)
            mean, mean_dot = mean + (phi * shift).sum(1), mean_dot + (phi_dot * shift).sum(1)
            log_std = log_std + (phi * widening).sum(1)
            log_std_dot = log_std_dot + (phi_dot * widening).sum(1)
        std = log_std.exp().expand_as(data)
        return Marginal(mean, std, mean_dot, log_std_dot * std)

    def state(
        self,
        data: Tensor,
        t: Tensor,
        *,
        draw: Callable[[str], Tensor],
        condition: Condition | None = None,
    ) -> Tensor:
        """Return x_t (B, ...) of data (B, ...) at times t (B,), the same under every condition."""
        return self.marginal(data, t).state(draw("noise").to(data.dtype))

    def square_volatility(self, t: Tensor) -> Tensor:
        """Return g^2 (B,) at times t (B,) < 1, in float64."""
        t = t.double()
        square = -self.path.sigma(t).square() * self.path.log_snr_dot(t)
        if self.volatility is not None:
            times = t.to(next(self.volatility.parameters()).dtype)
            factor = MOST_WIDENING * torch.tanh(self.volatility(times, times) / MOST_WIDENING)
            square = square * factor.double().exp()
        return square + self.least_volatility**2

    def predict(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return v (B, ...), of the state at unit variance."""
        return self.backbone(x / expand(self.path.scale(s, data_std=self.data_std), x), s, t, condition)

    def data_mean(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the data (B, ...) that the network predicts from x_t = x."""
        t = t.to(x.dtype)
        v = self.predict(x, t, t, condition)
        return self.path.end_points(x, v, t, kind="v", data_std=self.data_std)[0]

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dF/dt (B, ...) of the data predicted, at the noise that then explains x."""
        marginal = self.marginal(self.data_mean(x, t, condition), t)
        return marginal.velocity(marginal.noise(x))

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return (F(noise, t, data) - x) / (t - s) of the data and the noise at x_s = x: a step as DDIM's."""
        data = self.data_mean(x, s, condition)
        start = self.marginal(data, s)
        noise, gap = start.noise(x), expand(t - s, x)
        far = gap.abs() > NEAR
        chord = (self.marginal(data, t).state(noise) - x) / torch.where(far, gap, 1.0)
        return torch.where(far, chord, start.velocity(noise))

    def prior_term(self, data: Tensor) -> Tensor:
        """Return L_1 (B,) of data (B, ...) in closed form: 0, up to rounding."""
        end = self.marginal(data.double(), torch.ones(len(data), device=data.device))
        excess = end.mean.square() + end.std.square() - 1 - 2 * end.std.log()
        return excess.flatten(1).sum(1) / 2

    def data_term(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return -log p(data | x_0) (B,) at x_0 of a noise (B, ...)."""
        std = torch.full((len(data),), self.path.least, dtype=torch.float64, device=data.device)
        return -gaussian(data, data.double() + expand(std, data) * noise, std)

    def path_term(
        self, data: Tensor, noise: Tensor, t: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the integrand at times t (B,) < 1, in nats, and |data - predicted|^2 by dimension, (B,)."""
        true = self.marginal(data, t)
        x = true.state(noise)
        predicted = self.data_mean(x, t, condition)
        guess, square = self.marginal(predicted, t), self.square_volatility(t)
        drift = square.to(x.dtype)
        gap = true.reverse_drift(noise, drift) - guess.reverse_drift(guess.noise(x), drift)
        nats = gap.flatten(1).square().sum(1) / (2 * drift)
        return nats, (data - predicted).flatten(1).square().mean(1)


def polynomials(t: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return phi_k(t) = t (1 - t) (2 t - 1)^k of k = 0 .. order - 1 and their derivatives, (B, order)."""
    k = torch.arange(order, dtype=t.dtype, device=t.device)
    t = t[:, None]
    hill, middle = t * (1 - t), 2 * t - 1
    falling = 2 * k * middle ** (k - 1).clamp(min=0)
    return hill * middle**k, -middle * middle**k + hill * falling
