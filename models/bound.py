"""Bounds on the likelihood of a diffusion in discrete steps, term by term: in nats, one value a sample.

Noise comes in steps n = 1 .. N: x_n = sqrt(abar_n) data + sqrt(1 - abar_n) noise, with abar_0 = 1. The model
p goes back from x_N ~ N(0, I) by Gaussian steps with the means of q(x_{n-1} | x_n, data) at the data that it
predicts. Then

    -log p(data) <= L_N + sum_{n=2}^N L_{n-1} + L_0
    L_N     = KL( q(x_N | data) || N(0, I) )
    L_{n-1} = KL( q(x_{n-1} | x_n, data) || p(x_{n-1} | x_n) )
    L_0     = -log p(data | x_1)

in expectation over x_n ~ q. Of K whole paths x_1 .. x_N ~ q, the mean of the weights p(data, path) / q(path)
estimates p(data) itself, so that minus the logarithm of that mean is a bound, the tighter the larger K.

Everything is computed in float64: the terms of long chains are differences of nearly equal numbers.

Source: Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", 2020, eqs. 4 to 8 and 13; Burda,
Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016, eq. 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from .path import expand

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_n (B, ...), n (B,) int64) -> E[data | x_n] (B, ...)
Variance = Literal["fixed_small", "fixed_large"]
Decoder = Literal["discretised", "gaussian"]


class Kernels(Protocol):
    """A pair of Markov chains with Gaussian steps: q from data to noise, p from N(0, I) back."""

    @property
    def num_steps(self) -> int:
        """The number of steps N."""
        ...

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (B, ...) and standard deviation (B,) of q(x_n | x_{n-1} = x) for steps n (B,)."""
        ...

    def reverse_log_density(self, x: Tensor, later: Tensor, n: Tensor) -> Tensor:
        """Return log p(x_{n-1} = x | x_n = later) (B,)."""
        ...


@dataclass(frozen=True, eq=False)
class Chain:
    """The chain of a denoising model, with abar of the steps 1 .. N as `alpha_bar` (N,).

    The variance of p(x_{n-1} | x_n) is beta_n ("fixed_large") or that of q(x_{n-1} | x_n, data)
    ("fixed_small"), which is zero at n = 1. The decoder p(data | x_1) is a Gaussian of variance beta_1, that
    of smooth data given x_1; or for data u / 127.5 - 1 with u = 0 .. 255 ("discretised") the share that each
    value's bin has of a Gaussian of the variance of q(x_1 | x_2, data), as Ho et al. have it.
    """

    predict: Predict
    alpha_bar: Tensor
    variance: Variance = "fixed_large"
    decoder: Decoder = "gaussian"

    @property
    def num_steps(self) -> int:
        """The number of steps N."""
        return len(self.alpha_bar)

    @cached_property
    def _abar(self) -> Tensor:
        """abar_0 .. abar_N in float64, so that a step is its own index."""
        return torch.cat([torch.ones(1, device=self.alpha_bar.device), self.alpha_bar]).double()

    @cached_property
    def _beta(self) -> Tensor:
        """beta_0 = 0 (of no step), beta_1 .. beta_N."""
        abar = self._abar
        return torch.cat([torch.zeros_like(abar[:1]), 1 - abar[1:] / abar[:-1]])

    @cached_property
    def _posterior_variance(self) -> Tensor:
        """Variances of q(x_{n-1} | x_n, data), zero at n = 1: beta_n (1 - abar_{n-1}) / (1 - abar_n)."""
        abar = self._abar
        later = self._beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
        return torch.cat([torch.zeros_like(abar[:1]), later])

    @cached_property
    def _model_variance(self) -> Tensor:
        """Variances of p(x_{n-1} | x_n)."""
        variance = (self._posterior_variance if self.variance == "fixed_small" else self._beta).clone()
        narrow = self.decoder == "discretised" and self.num_steps > 1
        variance[1] = self._posterior_variance[2] if narrow else self._beta[1]
        return variance

    def state(self, data: Tensor, n: Tensor, noise: Tensor) -> Tensor:
        """Return x_n = sqrt(abar_n) data + sqrt(1 - abar_n) noise in float64."""
        abar = expand(self._abar[n], data)
        return abar.sqrt() * data.double() + (1 - abar).sqrt() * noise.double()

    def posterior_mean(self, data: Tensor, x: Tensor, n: Tensor) -> Tensor:
        """Return the mean of q(x_{n-1} | x_n = x, data); the data itself at n = 1."""
        return posterior_mean(data, x, self._abar[n - 1], self._abar[n])

    def prior_term(self, data: Tensor) -> Tensor:
        """Return L_N (B,) of data (B, ...), in closed form."""
        abar = self._abar[-1]
        excess = abar * data.double().flatten(1).square() - abar - torch.log1p(-abar)
        return excess.sum(1) / 2

    def step_term(self, data: Tensor, n: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_{n-1} and |data - predicted data|^2 (B,), at steps n (B,) >= 2 and one x_n a sample."""
        gap = data.double() - self._predicted(self.state(data, n, noise), n)
        error = gap.flatten(1).square().sum(1)
        of_data = self._abar[n - 1].sqrt() * self._beta[n] / (1 - self._abar[n])
        variance = self._model_variance[n]
        ratio = self._posterior_variance[n] / variance
        return (of_data.square() / variance * error + gap[0].numel() * (ratio - 1 - ratio.log())) / 2, error

    def data_term(self, data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_0 (B,) and |data - predicted data|^2 (B,), at one x_1 a sample."""
        first = torch.ones(len(data), dtype=torch.int64, device=data.device)
        mean = self._predicted(self.state(data, first, noise), first)
        return -self._decoded(data, mean), (data.double() - mean).flatten(1).square().sum(1)

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(x_n | x_{n-1} = x)."""
        return expand((1 - self._beta[n]).sqrt(), x) * x, self._beta[n].sqrt()

    def reverse_log_density(self, x: Tensor, later: Tensor, n: Tensor) -> Tensor:
        """Return log p(x_{n-1} = x | x_n = later) (B,), all of one step n."""
        mean = self.posterior_mean(self._predicted(later, n), later, n)
        return self._decoded(x, mean) if n[0] == 1 else gaussian(x, mean, self._model_variance[n].sqrt())

    def _predicted(self, x: Tensor, n: Tensor) -> Tensor:
        return self.predict(x, n).double()

    def _decoded(self, data: Tensor, mean: Tensor) -> Tensor:
        """Return log p(data | x_1) (B,) for a mean (B, ...)."""
        std = self._model_variance[1].sqrt()
        if self.decoder == "discretised":
            return discretised_gaussian(data, mean, std)
        return gaussian(data, mean, std.expand(len(data)))


def posterior_mean(data: Tensor, x: Tensor, before: Tensor, abar: Tensor) -> Tensor:
    """Return the mean of q(x_{n-1} | x_n = x, data), abar (B,) of n - 1 being `before`. Ho et al., eq. 7."""
    beta = 1 - abar / before
    of_data = before.sqrt() * beta / (1 - abar)
    of_state = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return expand(of_data, x) * data + expand(of_state, x) * x


def gaussian(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x; mean, std^2 I) (B,) for x and mean (B, ...) and std (B,)."""
    standard = ((x.double() - mean) / expand(std, x)).flatten(1)
    return -(standard.square() + math.log(2 * math.pi)).sum(1) / 2 - standard.shape[1] * std.log()


def discretised_gaussian(data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-probability (B,) that N(mean, std^2) gives the bins of data u / 127.5 - 1, u = 0 .. 255.

    Bins are 1 / 127.5 wide around their value; the first and the last are open to infinity, so that all 256
    sum to one. Source: Ho et al. 2020, eq. 13.
    """
    level = ((data.double() + 1) * 127.5).round()
    value = level / 127.5 - 1
    lower = torch.where(level <= 0, -torch.inf, (value - mean - 1 / 255) / std)
    upper = torch.where(level >= 255, torch.inf, (value - mean + 1 / 255) / std)
    # In the lower tail, where logarithms of distribution functions do not round to zero.
    above = lower > -upper
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return (log_upper + torch.log(-torch.expm1(log_lower - log_upper))).flatten(1).sum(1)


def log_weight(kernels: Kernels, data: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
    """Return log p(data, x_1 .. x_N) - log q(x_1 .. x_N | data) (B,) of one path a sample.

    `noise(n)` (B, ...) drives step n. Minus its mean is the bound; q may be any Gaussian chain, a learned one
    too. Source: Zhang and Chen, "Diffusion normalizing flow", 2021, eqs. 11 to 15, every normaliser kept.
    """
    x = data.double()
    weight = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for step in range(1, kernels.num_steps + 1):
        n = torch.full((len(x),), step, device=x.device)
        mean, std = kernels.forward(x, n)
        later = mean + expand(std, x) * noise(step).double()
        weight += kernels.reverse_log_density(x, later, n) - gaussian(later, mean, std)
        x = later
    return weight + gaussian(x, torch.zeros_like(x), torch.ones_like(weight))


def importance_weighted(log_weights: Tensor) -> Tensor:
    """Return the bound -log(mean weight) (B,) of log-weights (K, B) of K paths. Burda et al. 2016, eq. 8."""
    return math.log(len(log_weights)) - torch.logsumexp(log_weights, dim=0)
