"""Which sample stands at which position of the endless stream: a pure function.

The stream is epoch after epoch. In each epoch the shards are permuted, then the samples are permuted inside
windows of `window` shards that follow each other in that order. A small window reads few shards at a time,
which is what object storage and network disks want; `window=0` is one window, a full shuffle.

No permutation of samples is ever stored. Each window of n samples has its own keyed permutation of
[0, n), computed position by position with a Feistel network over a x b >= n cells; a value that falls on
one of the few cells beyond n is permuted again until it falls below ("cycle walking"). So the first sample
after a resume costs the same as the first sample of all.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), sections 3 and 4.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a data set whose shards hold `counts` samples.

    Plans of one seed with other names shuffle other samples, but have the same order of as many shards.
    """

    counts: Sequence[int] | np.ndarray
    seed: int
    window: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self._counts.min() < 0:
            raise ValueError(f"the shards hold {self.num_samples} samples; a plan needs at least one")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; expected a number of shards, or 0 for all of them")

    @cached_property
    def num_samples(self) -> int:
        """The number of samples of an epoch."""
        return int(self._counts.sum())

    @cached_property
    def _counts(self) -> np.ndarray:
        return self.counts if isinstance(self.counts, np.ndarray) else np.array(self.counts, np.int64)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the samples at the positions [start, stop) of the stream, across epochs."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at any positions of the stream, in the order asked for.

        A sample is its number in the data set: samples of the shards before it, plus its place in its shard.
        """
        shards, places = self.located(positions)
        return _starts(self._counts)[shards] + places

    def alike(self, position: int, draws: np.ndarray) -> np.ndarray:
        """Return samples of the next epoch's length of the stream, as draws of 64 bits choose them."""
        return self.at(self.after(position, draws))

    def after(self, position: int, draws: np.ndarray) -> np.ndarray:
        """Return positions of the next epoch's length of the stream."""
        return position + 1 + (draws % np.uint64(self.num_samples)).astype(np.int64)

    def located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of the sample at each position, and the sample's place in its shard."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is before the start of the stream")
        epochs, places = np.divmod(positions, self.num_samples)
        shards = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], places[chosen] = self._in_epoch(int(epoch), places[chosen])
        return shards, places

    def _in_epoch(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map places [0, num_samples) of one epoch to shards and places in them."""
        num_shards = len(self.counts)
        order = _order_of_shards(num_shards, self.seed, epoch)
        starts = _starts(self._counts[order])  # of each shard, in this epoch's order
        window_starts = np.append(starts[: num_shards : self.window or num_shards], self.num_samples)
        windows = np.searchsorted(window_starts, places, side="right") - 1
        shuffled = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            first, last = window_starts[window], window_starts[window + 1]
            keys = round_keys(f"plan {self.seed} {epoch} window {window}{self.name}")
            shuffled[chosen] = first + permuted(places[chosen] - first, int(last - first), keys)
        turns = np.searchsorted(starts, shuffled, side="right") - 1
        return order[turns], shuffled - starts[turns]


def rank_positions(start: int, batch_size: int, *, rank: int, world: int) -> np.ndarray:
    """Return the stream positions that one rank takes of the global batch [start, start + batch_size)."""
    return np.arange(start + rank, start + batch_size, world, dtype=np.int64)


@lru_cache(maxsize=64)
def _order_of_shards(num_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shards in the order of an epoch; plans of one data set ask for the same one."""
    keys = round_keys(f"plan {seed} {epoch} shards")
    order = permuted(np.arange(num_shards, dtype=np.int64), num_shards, keys)
    order.flags.writeable = False
    return order


def permuted(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply the keyed permutation of [0, size) to each of n values; `keys` are (rounds,), or (rounds, n)."""
    left_size = math.isqrt(size - 1) + 1 if size else 1
    right_size = -(-size // left_size)
    keys = np.broadcast_to(keys.reshape(len(keys), -1), (len(keys), len(values)))
    result = _feistel(values, left_size, right_size, keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], left_size, right_size, keys[:, outside])
        outside = result >= size
    return result


def _feistel(values: np.ndarray, left_size: int, right_size: int, keys: np.ndarray) -> np.ndarray:
    """Permute [0, left_size * right_size): each half is shifted by a hash of the other, in turn."""
    left, right = np.divmod(values, right_size)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _hash(right, key, left_size)) % left_size
        else:
            right = (right + _hash(left, key, right_size)) % right_size
    return left * right_size + right


def _hash(values: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """Hash values to [0, size) with the finaliser of SplitMix64."""
    mixed = values.astype(np.uint64) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed % np.uint64(size)).astype(np.int64)


def round_keys(purpose: str) -> np.ndarray:
    """Return the keys of one permutation; another purpose gives another one."""
    digest = hashlib.blake2b(f"driftmap {purpose}".encode(), digest_size=8 * _ROUNDS)
    return np.frombuffer(digest.digest(), np.dtype("<u8")).astype(np.uint64)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
