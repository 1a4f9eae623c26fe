"""Precision, recall, density and coverage: whether made pictures lie among real ones, and these among them.

A set is taken for the union of the balls around its points that reach to their k-th neighbours.
Source: Kynkaanniemi et al., "Improved precision and recall", 2019, eq. 2; Naeem et al., "Reliable fidelity
and diversity metrics", 2020, eq. 4 and 5.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

NEIGHBOURS = 5
_BLOCK = 1024


class Cloud:
    """Points (N, F) and the balls around them; N must be more than the number of neighbours."""

    def __init__(self, points: Tensor, *, neighbours: int = NEIGHBOURS) -> None:
        if len(points) <= neighbours:
            raise ValueError(f"{len(points)} samples have no {neighbours} neighbours each; compare more")
        self.points = points.double()
        self.neighbours = neighbours

    def blocks(self, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, distances of these points to all `others`), some rows at a time."""
        for start in range(0, len(self.points), _BLOCK):
            rows = slice(start, min(start + _BLOCK, len(self.points)))
            yield rows, torch.cdist(self.points[rows], others)

    @cached_property
    def radii(self) -> Tensor:
        """The distance (N,) of every point to its k-th neighbour; nearest is the point itself."""
        parts = (distances.kthvalue(self.neighbours + 1).values for _, distances in self.blocks(self.points))
        return torch.cat(list(parts))


def neighbour_shares(made: Cloud, real: Cloud) -> dict[str, float]:
    """Return the four shares of two clouds.

    precision = mean over made of [in a ball of a real one], recall = the same with the sets exchanged,
    density = mean over made of (how many real balls it is in) / k,
    coverage = mean over real of [a made one is in its ball].
    """
    in_real = torch.zeros(len(made.points), dtype=torch.float64)
    recalled = covered = 0
    for rows, distances in real.blocks(made.points):
        inside = distances < real.radii[rows, None]
        in_real += inside.sum(0)
        covered += inside.any(1).sum().item()
        recalled += (distances < made.radii).any(1).sum().item()
    return {
        "precision": (in_real > 0).double().mean().item(),
        "recall": recalled / len(real.points),
        "density": in_real.mean().item() / real.neighbours,
        "coverage": covered / len(real.points),
    }
