"""Which samples stand for a set: drawn by a fixed seed, so that no order of classes can alias with it."""

import numpy as np


def chosen(total: int, count: int) -> np.ndarray:
    """Return `count` of the numbers 0 .. total - 1 in ascending order, all of them if there are no more."""
    if count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def partners(total: int) -> np.ndarray:
    """Return for each of 0 .. total - 1 another one: the next along one random cycle through all."""
    order = np.random.default_rng(1).permutation(total)
    others = np.empty(total, np.int64)
    others[order] = np.roll(order, -1)
    return others
