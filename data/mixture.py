"""Several endless streams as one, each with its weight: a pure function of the position, as a plan is.

The stream is cut into units of `stride` positions. A unit is of one source, and takes the next `stride`
positions of that source's own stream. So what a plan promises holds for every source by itself: in its own
stream each of its epochs holds each of its samples exactly once, wherever the units of others lie between.

Which source a unit is of, and how many units of it came before, is a closed form. Weights are whole numbers
w_1 .. w_n; they are the leaves of a binary tree, and at a node with the weights l to its left and r to its
right, of the first u units floor(u l / (l + r)) go left. So the first u units hold u w_i / (w_1 + ... + w_n)
of source i, up to one for each level of the tree, for every u: weights are kept exactly, for ever.

That order is regular, so units are permuted inside periods, where each source keeps the order of its own. A
period is the sum of the weights where that is small: 3 to 1 is kept in any four units that begin with one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from .plan import permuted, round_keys

_LONGEST_PERIOD = 4096
_BLOCK = 1024  # units that are looked up together, at least
_LARGEST_SUM = 2**31  # of the weights: its square is a number of 64 bits


class Order(Protocol):
    """Which sample stands at which position of an endless stream."""

    @property
    def seed(self) -> int:
        """What it was shuffled by."""
        ...

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at any positions of the stream, in the order asked for."""
        ...

    def alike(self, position: int, draws: np.ndarray) -> np.ndarray:
        """Return samples that may stand in the place of one, as draws of 64 bits choose them."""
        ...


@dataclass(frozen=True, eq=False)
class Mixture:
    """The order of several streams mixed by their weights, `stride` positions of one at a time."""

    sources: Sequence[Order]
    weights: Sequence[Fraction | float]
    seed: int
    stride: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ValueError(
                f"{len(self.sources)} sources have {len(self.weights)} weights; expected one each"
            )
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; expected a number of samples")
        _ = self._whole

    @cached_property
    def _whole(self) -> tuple[int, ...]:
        return whole_weights(self.weights)

    @cached_property
    def period(self) -> int:
        """The number of units that are permuted together."""
        return min(sum(self._whole), _LONGEST_PERIOD)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at any positions of the stream, in the order asked for."""
        sources, places = self.located(np.asarray(positions, np.int64))
        result = np.empty_like(places)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            result[chosen] = self.sources[source].at(places[chosen])
        return result

    def alike(self, position: int, draws: np.ndarray) -> np.ndarray:
        """Return samples of the source of the one at a position, as draws choose them."""
        sources, places = self.located(np.array([position]))
        return self.sources[sources[0]].alike(int(places[0]), draws)

    def located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each position, and the position in its own stream."""
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is before the start of the stream")
        units, inside = np.divmod(positions, self.stride)
        num_periods = -(-_BLOCK // self.period)
        blocks, places = np.divmod(units, num_periods * self.period)
        sources, turns = np.empty_like(units), np.empty_like(units)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            periods = range(block * num_periods, (block + 1) * num_periods)
            of, before = _in_periods(self._whole, self.period, f"mixture {self.seed}{self.name}", periods)
            sources[chosen], turns[chosen] = of[places[chosen]], before[places[chosen]]
        return sources, turns * self.stride + inside


def whole_weights(weights: Sequence[Fraction | float]) -> tuple[int, ...]:
    """Return weights as the smallest whole numbers of the same proportions, or near them if those are large.

    Raises `ValueError` for a weight that is not above 0.
    """
    if wrong := [weight for weight in weights if not 0 < weight < math.inf]:
        raise ValueError(f"the weight {wrong[0]} is no positive number; leave out what is not wanted")
    # 0.7 is meant as 7/10, and not as the binary number next to it.
    exact = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if (total := sum(whole)) > _LARGEST_SUM:
        whole = [max(1, weight * _LARGEST_SUM // total) for weight in whole]
    return tuple(whole)


@lru_cache(maxsize=8)
def _in_periods(
    weights: tuple[int, ...], length: int, key: str, periods: range
) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each unit of some periods, and how many units of that source came before it."""
    start = periods[0] * length
    units = np.arange(start, start + len(periods) * length, dtype=np.int64)
    sources, turns = _spread(units, weights)
    keys = np.stack([round_keys(f"{key} {period}") for period in periods], axis=1)
    within, inside = np.divmod(units - start, length)
    mixed = sources[within * length + permuted(inside, length, keys[:, within])]
    kept = np.empty_like(turns)
    # The units of each source come in the order that they had before.
    kept[np.argsort(mixed, kind="stable")] = turns[np.argsort(sources, kind="stable")]
    return mixed, kept


def _spread(units: np.ndarray, weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each unit and how many of that source came before it, as the module says."""
    starts = np.cumsum((0, *weights))
    first, last = np.zeros_like(units), np.full_like(units, len(weights))
    while (last - first > 1).any():
        middle = (first + last) // 2
        left, both = starts[middle] - starts[first], starts[last] - starts[first]
        before, after = _floor(units, left, both), _floor(units + 1, left, both)
        goes_left = after > before
        units = np.where(goes_left, before, units - before)
        first, last = np.where(goes_left, first, middle), np.where(goes_left, middle, last)
    return first, units


def _floor(units: np.ndarray, left: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Return floor(units left / both), whose product may need more than 64 bits."""
    rounds, rest = np.divmod(units, both)
    return rounds * left + rest * left // both
