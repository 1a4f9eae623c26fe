"""The order of a data set: its plan, or a mixture of the plans of its parts.

What is mixed are the data sets that were joined, by their weights, or with `balance` their classes, of which
all in a data set weigh the same. Each of them is a stream of its own, and in its epochs each of its samples
stands exactly once: the samples of a rare class come again before those of a frequent one have all come.

A data set may hold pictures of several sizes, each shard those of one, its bucket. Then `bucket_batch`
samples in a row are of one bucket, whatever else is mixed. Each bucket is a stream of its own again, weighed
by what it holds, so no sample is dropped: those that do not fill a last batch stand in one with the first of
the next epoch of their bucket.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np

from .index import NO_LABEL
from .labels import CLASS
from .mixture import Mixture, Order
from .plan import Plan
from .reader import Reader
from .shards import ShardSet

_THREADS = 8  # that load indices, which may be far away


@dataclass(frozen=True)
class Mixing:
    """How a data set is mixed: the weights of what was joined, and whether classes are balanced."""

    weights: tuple[float, ...] = ()
    balance: bool = False


@dataclass(frozen=True, eq=False)
class Classes:
    """Which samples are of which class.

    `rows` (n,) are the rows of each shard after the other, in each shard sorted by class; `before` are
    (shards, classes + 1), how many of a shard come before each class in that order.
    """

    names: Sequence[int]
    starts: np.ndarray
    rows: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, labels: Iterable[np.ndarray], names: Sequence[int], counts: Sequence[int]) -> "Classes":
        """Return the table of the labels of shard after shard, which are all in the sorted `names`."""
        starts = _starts(counts)
        rows = np.empty(sum(counts), np.min_scalar_type(max(counts)))
        before = np.zeros((len(counts), len(names) + 1), np.int32)
        for shard, found in enumerate(labels):
            # numpy sorts numbers of 16 bits by their digits, in a tenth of the time.
            places = np.searchsorted(names, found).astype(np.min_scalar_type(len(names)))
            rows[starts[shard] : starts[shard] + counts[shard]] = np.argsort(places, kind="stable")
            np.cumsum(np.bincount(places, minlength=len(names)), out=before[shard, 1:])
        return cls(names, starts, rows, before)

    @classmethod
    def of_shards(cls, shards: ShardSet) -> "Classes":
        """Load the classes of all samples from their indices.

        Raises `ValueError` where labels are no classes, or a sample has none; it is named.
        """
        if shards.label != CLASS or not shards.labels:
            found = f"is labelled by {shards.label!r}" if shards.labels else "holds no class labels (.cls)"
            raise ValueError(f"balance: class needs classes, but {shards.folder} {found}; remove it")

        def load(shard: int) -> np.ndarray:
            index = shards.load_index(shard)
            if (missing := np.flatnonzero(index.labels == NO_LABEL)).size:
                Reader(shards).labels(shards.starts[shard] + missing[:1])  # says what is wrong with it
            return index.labels

        with ThreadPoolExecutor(_THREADS, "driftmap indices") as pool:
            labels = pool.map(load, range(len(shards.shards)))
            return cls.of(labels, sorted(shards.labels), shards.counts)

    def counts(self, shards: np.ndarray, place: int) -> np.ndarray:
        """Return how many samples of the class at this place among the names each of some shards holds."""
        return self.before[shards, place + 1] - self.before[shards, place]

    def samples(self, place: int, shards: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Return the samples that are so many-th of a class in their shards."""
        starts = self.starts[shards]
        return starts + self.rows[starts + self.before[shards, place] + turns]


@dataclass(frozen=True, eq=False)
class Part:
    """The order of what counts in some shards of a data set: the plan's samples, and which ones they are."""

    plan: Plan
    shards: np.ndarray
    samples: Callable[[np.ndarray, np.ndarray], np.ndarray]  # of shards, and turns in them

    @property
    def seed(self) -> int:
        """The plan's."""
        return self.plan.seed

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at any positions of the stream, in the order asked for."""
        located, turns = self.plan.located(positions)
        return self.samples(self.shards[located], turns)

    def alike(self, position: int, draws: np.ndarray) -> np.ndarray:
        """Return samples of the next epoch's length of the stream, as draws choose them."""
        return self.at(self.plan.after(position, draws))


def order_of(shards: ShardSet, mixing: Mixing, *, seed: int, window: int, bucket_batch: int) -> Order:
    """Return the order of a data set; without anything to mix it is its plan.

    Raises `ValueError` where classes are to be balanced that are not known.
    """
    if mixing.weights and len(mixing.weights) != len(shards.joined):
        raise ValueError(
            f"{len(shards.joined)} data sets have {len(mixing.weights)} weights; expected one each"
        )
    if not (mixing.weights or mixing.balance or len(shards.buckets) > 1):
        return Plan(shards.counts, seed, window)
    classes = Classes.of_shards(shards) if mixing.balance else None
    return mixed(shards, mixing, classes, seed=seed, window=window, bucket_batch=bucket_batch)


def mixed(
    shards: ShardSet,
    mixing: Mixing,
    classes: Classes | None,
    *,
    seed: int,
    window: int,
    bucket_batch: int,
) -> Order:
    """Return the mixture of all parts of a data set; `classes` are to be balanced."""
    sets, counts = _sets(shards), np.array(shards.counts)
    weights = mixing.weights or [int(counts[own].sum()) for own in sets]
    buckets: list[Order] = []
    shares: list[Fraction] = []
    for size, bucket in shards.buckets.items():
        parts: list[Order] = []
        weighed: list[Fraction] = []
        for number, (weight, own) in enumerate(zip(weights, sets, strict=True)):
            key = (seed, window, f" of {size} in {number}")
            for part, share in _parts(shards, classes, own, np.intersect1d(own, bucket), key):
                parts.append(part)
                weighed.append(Fraction(str(weight)) * share)
        if parts:
            buckets.append(Mixture(parts, weighed, seed, name=f" of {size}"))
            shares.append(sum(weighed, Fraction()))
    return Mixture(buckets, shares, seed, bucket_batch) if len(buckets) > 1 else buckets[0]


def _parts(
    shards: ShardSet, classes: Classes | None, own: np.ndarray, chosen: np.ndarray, key: tuple[int, int, str]
) -> Iterator[tuple[Part, Fraction]]:
    """Yield what is mixed of the chosen ones of a data set's own shards, and its share of that data set."""
    seed, window, name = key
    if classes is None:
        starts, counts = np.array(shards.starts), np.array(shards.counts)
        if num_samples := int(counts[chosen].sum()):
            plan = Plan(counts[chosen], seed, window, name)
            yield (
                Part(plan, chosen, lambda shards, turns: starts[shards] + turns),
                Fraction(num_samples, int(counts[own].sum())),
            )
        return
    totals = np.diff(classes.before[own].sum(axis=0))
    for place in np.flatnonzero(totals).tolist():
        counts = classes.counts(chosen, place)
        if num_samples := int(counts.sum()):
            plan = Plan(counts, seed, window, f"{name} class {classes.names[place]}")
            yield (
                Part(plan, chosen, partial(classes.samples, place)),
                Fraction(num_samples, int(totals[place]) * int((totals > 0).sum())),
            )


def window_fits(shards: ShardSet, window: int) -> bool:
    """Return whether the shards that are read in turn fit into the cache together, and warn if not."""
    assert shards.remote is not None
    sizes, needed, num_shards = np.array(shards.num_bytes), 0, 0
    for own in _sets(shards):
        for bucket in shards.buckets.values():
            largest = np.sort(sizes[np.intersect1d(own, bucket)])[-window:]
            needed, num_shards = needed + int(largest.sum()), num_shards + len(largest)
    if needed <= shards.remote.cache.max_bytes:
        return True
    warnings.warn(
        f"the {num_shards} shards of {shards.folder} that are shuffled together have {needed} bytes, but "
        f"their cache holds {shards.remote.cache.max_bytes}: samples of the others are read one by one, "
        "which is slow; set data.window to fewer shards, or data.cache_bytes higher",
        stacklevel=4,
    )
    return False


def _sets(shards: ShardSet) -> list[np.ndarray]:
    """Return the shards of each data set that was joined."""
    return np.split(np.arange(len(shards.counts)), np.cumsum(shards.joined, dtype=int)[:-1])


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.cumsum((0, *counts))[:-1]
