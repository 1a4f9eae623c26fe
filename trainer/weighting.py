"""Weights of a denoising loss by noise level, all on one scale: the squared error of the noise.

    loss = E_t [ w(t) |noise - predicted noise|^2 ]

What a network predicts instead is brought to this scale by `Path.noise_error`; so one weighting means the
same loss whatever is predicted. With snr = alpha^2 / sigma^2, errors of noise and data are related by |noise
error|^2 = snr |data error|^2.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.bound import Variance
from ..models.path import Path
from ..models.schedule import Discrete
from .objective import STRICT


@dataclass(frozen=True, config=STRICT)
class Flat:
    """1 on what the network predicts: L_simple for noise, EDM's weights for v."""

    name: Literal["prediction"] = "prediction"


@dataclass(frozen=True, config=STRICT)
class Simple:
    """1 on the noise, whatever is predicted. Source: Ho et al., 2020, eq. 14."""

    name: Literal["simple"]

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        return torch.ones_like(t)


@dataclass(frozen=True, config=STRICT)
class Bound:
    """The bound on -log p(data): the loss is what depends on the network in it, in nats a dimension.

    On a discrete path of N steps N times the term of step n, beta_n^2 / (2 var_n (1 - beta_n) (1 - abar_n)),
    with the variance var_n of the reverse step; at n = 1 the one of n = 2, with Ho et al.'s decoder left
    a Gaussian. On the others -1/2 d log snr / dt, the limit of infinitely many steps.

    Sources: Ho et al., 2020, eq. 12; Kingma et al., "Variational diffusion models", 2021, section 4.
    """

    name: Literal["bound"]
    variance: Variance | None = None  # of a discrete path: fixed_small where it is not given

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        if not isinstance(path, Discrete):
            return -path.log_snr_dot(t) / 2
        beta, posterior = path.betas.to(t.device), path.posterior_variance.to(t.device)
        variance = beta.clone() if self.variance == "fixed_large" else posterior
        variance[0] = posterior[1]
        n = (t * path.num_steps).round().long() - 1
        # 1 - beta_n is abar_n / abar_{n-1}; abar_n from the path, so that it cancels where it is nearly 0.
        before = torch.cat([torch.ones_like(beta[:1]), path.alpha_bar.to(t.device)])[n]
        signal, noise = path.alpha(t).square(), path.sigma(t).square()
        return path.num_steps * beta[n].square() * before / (2 * variance[n] * signal * noise)


@dataclass(frozen=True, config=STRICT)
class MinSnr:
    """min(snr, gamma) on the data. Source: Hang et al., "Efficient diffusion training", 2023."""

    name: Literal["min_snr"]
    gamma: Annotated[float, Field(gt=0)] = 5.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        return (self.gamma / path.snr(t)).clamp(max=1)


@dataclass(frozen=True, config=STRICT)
class P2:
    """1 / (k + snr)^gamma on the noise. Source: Choi et al., "Perception prioritized training", 2022."""

    name: Literal["p2"]
    k: Annotated[float, Field(gt=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 1.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        return (self.k + path.snr(t)) ** -self.gamma


@dataclass(frozen=True, config=STRICT)
class Sigmoid:
    """sigmoid(bias - log snr) of the bound's -1/2 d log snr / dt: less weight where there is little noise.

    Source: Kingma and Gao, "Understanding diffusion objectives as the ELBO with simple data augmentation",
    2023 (VDM++).
    """

    name: Literal["sigmoid"]
    bias: float = 2.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        return torch.sigmoid(self.bias - path.snr(t).log()) * -path.log_snr_dot(t) / 2


@dataclass(frozen=True, config=STRICT)
class Edm:
    """1 / data_std^2 + snr on the data. Source: Karras et al., 2022, table 1, lambda(sigma)."""

    name: Literal["edm"]
    data_std: Annotated[float, Field(gt=0)] = 0.5

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """Return w (B,) at times t (B,) in float64."""
        return 1 + self.data_std**-2 / path.snr(t)


Weighting = Annotated[Flat | Simple | Bound | MinSnr | P2 | Sigmoid | Edm, Field(discriminator="name")]
OVER_UNIFORM_TIMES = (Bound, Sigmoid)  # integrals over time: other times would weight them once more
