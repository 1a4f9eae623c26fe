"""The kernel distance: a squared maximum mean discrepancy, unbiased, which may be negative by chance."""

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000


def discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared discrepancy of (N, F) and (M, F) by the kernel (x.y / F + 1)^3.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, section 4.
    """
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(first) + within(second) - 2 * kernel(first, second).mean()).item()


def kernel_distance(
    first: Tensor, second: Tensor, *, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> float:
    """Return the mean discrepancy of subsets drawn by a seed, or of whole sets no larger."""
    if max(len(first), len(second)) <= subset_size:
        return discrepancy(first, second)
    draws = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        parts = [features[draws.permutation(len(features))[:subset_size]] for features in (first, second)]
        values.append(discrepancy(*parts))
    return torch.tensor(values, dtype=torch.float64).mean().item()
