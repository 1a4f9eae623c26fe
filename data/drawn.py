"""Samples drawn from a data set, for something to be made of what labels them: classes or captions.

The draw is the order of training: each sample comes once before any comes again, whatever their number. A
drawn sample has its number as its key, and only the members that label it.
"""

import threading
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .decode import Batch, find_decoder
from .labels import CLASS, member_of
from .mixture import Order
from .order import Mixing, order_of
from .reader import Reader, Sample
from .samples import Samples
from .shards import ShardSet

_NOT_OF_SAMPLES = ("buckets", "left_out")  # what a card says of its own shards


@dataclass(frozen=True)
class Draw:
    """`num_samples` samples of a data set, in shards of their own."""

    shards: ShardSet
    num_samples: int
    samples_per_shard: int
    seed: int = 0
    mixing: Mixing = Mixing()

    @cached_property
    def as_set(self) -> ShardSet:
        """The data set of the drawn samples, which lies nowhere yet; it was made from what the other was."""
        full, rest = divmod(self.num_samples, self.samples_per_shard)
        counts = (self.samples_per_shard,) * full + ((rest,) if rest else ())
        info = {name: value for name, value in self.shards.info.items() if name not in _NOT_OF_SAMPLES}
        return replace(
            self.shards,
            shards=tuple(map(_tar, range(len(counts)))),
            counts=counts,
            extensions=tuple(sorted(self.members)),
            fingerprint=info.get("encoded_from", self.shards.fingerprint),
            info=info,
            remote=None,
            joined=(),
        )

    def labels(self, numbers: np.ndarray) -> Batch:
        """Return what labels these samples: `label` (B,), `text` with `text_mask`, or nothing."""
        return self._samples.labels(self.order.at(numbers))

    def reader(self, source: ShardSet, *, stop: threading.Event | None = None) -> Reader:
        """Return what reads the samples of `as_set`, which is `source`, by their numbers."""
        return _DrawnReader(self, stop=stop)

    @cached_property
    def order(self) -> Order:
        """Which sample of the data set each number is."""
        return order_of(self.shards, self.mixing, seed=self.seed, window=0, bucket_batch=1)

    @cached_property
    def members(self) -> set[str]:
        """The members that are kept."""
        return {CLASS, member_of(self.shards.label)} & set(self.shards.extensions)

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.shards, find_decoder(self.shards))


class _DrawnReader(Reader):
    """Reads drawn samples."""

    def __init__(self, draw: Draw, *, stop: threading.Event | None) -> None:
        super().__init__(draw.shards, extensions=draw.members, stop=stop)
        self.draw = draw

    def read(self, sample: int) -> Sample:
        """Read one sample, under its number as its key."""
        found = super().read(int(self.draw.order.at(np.array([sample]))[0]))
        return Sample(f"{sample:08d}", _tar(sample // self.draw.samples_per_shard), found.members)


def _tar(number: int) -> str:
    return f"shard-{number:06d}.tar"
