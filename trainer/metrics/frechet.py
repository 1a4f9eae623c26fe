"""The Frechet distance between Gaussians fitted to features, from statistics that fit a stream."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ..world import World


@dataclass
class Moments:
    """Number, mean (F,) and scatter (F, F) = sum (f - mean)(f - mean)^T of a stream of features, float64.

    Deviations are from means, so large features lose no digits. Source: Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1, for many dimensions.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    _factor: Tensor | None = field(default=None, repr=False)  # until the next update

    @classmethod
    def empty(cls, num_features: int) -> Self:
        """Return the moments of no features."""
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        return cls(0, zeros[0].clone(), zeros)

    def update(self, features: Tensor) -> None:
        """Add features (B, F)."""
        if not len(features):
            return
        features = features.double().cpu()
        mean = features.mean(0)
        centred = features - mean
        self.add(Moments(len(features), mean, centred.T @ centred))

    def add(self, other: "Moments") -> None:
        """Add the moments of other features."""
        if not other.count:
            return
        gap, total = other.mean - self.mean, self.count + other.count
        self.scatter.add_(other.scatter).addr_(gap, gap, alpha=self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total
        self._factor = None

    def merged(self, world: World) -> "Moments":
        """Return the moments of the streams of all processes; every process must call."""
        if world.size == 1:
            return self
        sums = world.total(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        mean, count = sums[:-1] / sums[-1], round(sums[-1].item())
        gap = self.mean - mean
        scatter = world.total(self.scatter.addr(gap, gap, alpha=self.count))
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (F, F)."""
        return self.scatter / (self.count - 1)

    @property
    def factor(self) -> Tensor:
        """A matrix A (F, F) with A A^T the covariance; what rounding left where there is nothing is zero."""
        factor = self._factor
        if factor is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            noise = values.max() * len(values) * torch.finfo(values.dtype).eps
            factor = self._factor = vectors * torch.where(values > noise, values, 0).sqrt()
        return factor


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = A A^T the trace of (C1 C2)^(1/2) is the sum of the singular values of A1^T A2. Source: Dowson and
    Landau, 1982, eq. 4; for pictures: Heusel et al., 2017, eq. 6. Raises ValueError for sets of one sample.
    """
    if min(first.count, second.count) < 2:
        raise ValueError(f"sets of {first.count} and {second.count} samples; a covariance needs two or more")
    gap = first.mean - second.mean
    cross = torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    return (gap @ gap + first.covariance.trace() + second.covariance.trace() - 2 * cross).item()
