"""The maximum mean discrepancy of sets of points, and how pure the neighbourhoods of classes are.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)
    k(x, y) = mean over widths w of exp(-|x - y|^2 / (2 w^2))

over all pairs, a point and itself included, so that it is the distance of the two sets' embeddings and never
negative. Two sets of fresh data are not at 0 but at a floor, which falls with their size. The widths are
shares of the median distance between real points: the wide kernel sees where mass lies, the narrow one
whether edges are sharp.

Source: Gretton et al., "A kernel two-sample test", 2012, eq. 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (1 / 20, 1 / 5, 1.0)  # of the median distance
_BLOCK = 1024
_FEW = 1000  # points whose distances give the median


def usual_widths(real: Tensor) -> tuple[float, ...]:
    """Return the widths of the kernels for points (N, D) such as these."""
    median = torch.pdist(real[:_FEW].double()).median().item()
    return tuple(width * median for width in WIDTHS)


def mean_kernel(first: Tensor, second: Tensor, widths: Sequence[float]) -> float:
    """Return the mean of k over all pairs of points (N, D) and (M, D)."""
    total = 0.0
    for part in first.double().split(_BLOCK):
        square = torch.cdist(part, second.double()).square()
        total += sum(torch.exp(-square / (2 * width**2)).sum().item() for width in widths) / len(widths)
    return total / (len(first) * len(second))


def mean_discrepancy(
    first: Tensor, second: Tensor, widths: Sequence[float], *, within_second: float | None = None
) -> float:
    """Return the MMD of points (N, D) and (M, D); `within_second` is the second set's own mean kernel."""
    of_second = mean_kernel(second, second, widths) if within_second is None else within_second
    square = mean_kernel(first, first, widths) + of_second - 2 * mean_kernel(first, second, widths)
    return math.sqrt(max(0.0, square))


def purity(points: Tensor, labels: Tensor, *, neighbours: int) -> tuple[float, float]:
    """Return the share of the nearest neighbours of points (N, D) that have their label, and chance's share.

    Raises ValueError where there are no more points than neighbours.
    """
    if len(points) <= neighbours:
        raise ValueError(f"{len(points)} points have no {neighbours} neighbours each; give more")
    same = 0.0
    for start in range(0, len(points), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance = torch.cdist(points[rows].double(), points.double())
        own = torch.arange(len(distance))
        distance[own, start + own] = math.inf
        nearest = distance.topk(neighbours, largest=False).indices
        same += (labels[nearest] == labels[rows, None]).double().sum().item()
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return same / (len(points) * neighbours), shares.square().sum().item()
