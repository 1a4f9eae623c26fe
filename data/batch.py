"""Batches as tensors, in the order of a plan, read ahead in threads.

`Batches.position` is the whole state: the stream position after the last batch that was handed out, whatever
has been read beyond it. `Batches(..., start=position)` goes on there, on any number of ranks.

Threads and not processes: the bytes of latents are decoded by a copy, and sending them from another process
costs more than that. Copying, checksums and the decoders of pictures let other threads run, so batches are
made side by side.
"""

import os
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from .ahead import Job, ReadAhead
from .decode import Batch, Decoder, find_decoder, with_floats
from .faults import GoodSamples, Quarantine
from .mixture import Order
from .order import Mixing, order_of, window_fits
from .plan import rank_positions
from .prefetch import Ahead, Prefetch
from .reader import Reader
from .samples import Samples
from .shards import ShardSet

_LOOKED_UP = 2048  # positions at a time


@dataclass(frozen=True)
class Stream:
    """Which samples go where: the order of the stream, and this rank's share of each global batch.

    `batch_size` is the global one. Where pictures have several sizes, `bucket_batch` samples in a row have
    one, by default the batch size: with accumulation the samples of an optimizer step.
    """

    batch_size: int
    seed: int
    window: int = 0
    rank: int = 0
    world: int = 1
    mixing: Mixing = Mixing()
    bucket_batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank}; expected 0 to {self.world - 1}")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(
                f"batch_size is {self.batch_size} over {self.world} ranks; "
                f"expected a positive multiple of {self.world}"
            )
        if self.bucket_batch is not None and self.bucket_batch % self.batch_size:
            raise ValueError(
                f"bucket_batch is {self.bucket_batch}; expected a multiple of batch_size {self.batch_size}"
            )


class Batches(ReadAhead):
    """An endless iterator of this rank's part of each global batch.

    A batch holds `index` (stream positions, int64), what the decoder gives (`data`, or `mean` and `std`) in
    the types that it is stored in, and what labels the samples (labels.py), if anything does: `label`
    (int64), or `text` with `text_mask`.

    `workers` threads, one at least, make batches side by side. Where it is left out the decoder knows what
    pays.

    `next` raises `ValueError` for a sample that cannot be read or decoded; it names the shard and the key.
    With a `quarantine` a good one takes its place, and it is kept there, see faults.py.
    """

    def __init__(
        self,
        shards: ShardSet,
        stream: Stream,
        *,
        decoder: Decoder | None = None,
        start: int = 0,
        prefetch: int = 4,
        workers: int | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(stream.batch_size, start=start, prefetch=prefetch)
        self.stream = stream
        together = stream.bucket_batch or stream.batch_size
        self.plan = order_of(
            shards, stream.mixing, seed=stream.seed, window=stream.window, bucket_batch=together
        )
        evict = shards.remote is None or window_fits(shards, stream.window)
        decoder = decoder or find_decoder(shards)
        self._samples = Samples(shards, decoder, evict=evict, stop=self.stopped)
        fetching = _prefetch(self._samples.reader, self.plan, stream, start) if shards.remote else None
        paying: int = getattr(decoder, "workers", 0)
        workers = min(paying, os.cpu_count() or 1) if workers is None else workers
        self._good = None if quarantine is None else GoodSamples(self._samples, self.plan, quarantine)
        reading = _Reading(self._good or self._samples, _shares(self.plan, stream, start), fetching)
        others = fetching.threads if fetching else ()
        self.begin(reading.jobs, num_threads=max(workers, 1), others=others)

    @property
    def reader_stats(self) -> dict[str, int]:
        """What went over the network, failed there or was in the cache; empty for a local folder."""
        remote = self._samples.reader.shards.remote
        return remote.stats() if remote is not None else {}

    def keys_of(self, index: torch.Tensor) -> list[str]:
        """Return the keys of the samples at these stream positions, for messages about them."""
        positions = index.detach().cpu().numpy()
        samples = self.plan.at(positions)
        if self._good is not None:
            samples = self._good.chosen(samples, positions)
        return [self._samples.reader.key(int(sample)) for sample in samples]


def ordered(
    shards: ShardSet,
    batch_size: int,
    *,
    decoder: Decoder | None = None,
    rank: int = 0,
    world: int = 1,
    done: Container[int] = (),
) -> Iterator[Batch]:
    """Yield every sample once in the order of the data set, for evaluation.

    A batch is of one size of pictures, and the last of each size may be short. Of several ranks each gets
    whole batches in turn, so that a batch is the same for any number of them.
    Batches that begin with a sample in `done` are left out.
    `index` is the number of each sample in the data set; `data`, or `mean` and `std`, are float32.
    """
    source = Samples(shards, decoder or find_decoder(shards))
    cut = (
        each[first : first + batch_size]
        for each in shards.stretches
        for first in range(0, len(each), batch_size)
    )
    for part in islice(cut, rank, None, world):
        if part.start in done:
            continue
        numbers = np.arange(part.start, part.stop, dtype=np.int64)
        yield with_floats(source.batch(numbers, index=numbers))


def _shares(plan: Order, stream: Stream, start: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield where each global batch begins, and the positions and samples of this rank's share of it."""
    share = stream.batch_size // stream.world
    many = max(1, _LOOKED_UP // share)  # at a time: one long look costs a tenth of many short ones
    while True:
        index = rank_positions(start, many * stream.batch_size, rank=stream.rank, world=stream.world)
        for positions, numbers in zip(np.split(index, many), np.split(plan.at(index), many), strict=True):
            yield start, positions, numbers
            start += stream.batch_size


@dataclass(frozen=True)
class _Reading:
    """What makes this rank's batches, one after another."""

    samples: Samples | GoodSamples
    shares: Iterator[tuple[int, np.ndarray, np.ndarray]]
    fetching: Prefetch | None

    def jobs(self) -> Generator[Job]:
        """Go on to the next batch, and yield what reads it."""
        for start, positions, numbers in self.shares:
            if self.fetching is not None:
                self.fetching.advance(start)
            yield partial(self.samples.batch, numbers, index=positions)


def _prefetch(reader: Reader, plan: Order, stream: Stream, start: int) -> Prefetch:
    """Start to bring the shards of a stream into the cache in the order of the plan."""
    shards = reader.shards
    assert shards.remote is not None and reader.stop is not None
    starts = np.array(shards.starts)

    def shards_at(begin: int, end: int) -> np.ndarray:
        positions = np.arange(begin + stream.rank, end, stream.world, dtype=np.int64)
        return np.searchsorted(starts, plan.at(positions), side="right") - 1

    ahead = Ahead(
        shards_at,
        sizes=shards.num_bytes,
        # The largest shard fits besides: the one that the reader is leaving may be in use still.
        max_bytes=shards.remote.cache.max_bytes - max(shards.num_bytes),
        stride=-(-_LOOKED_UP // stream.batch_size) * stream.batch_size,
        cursor=start,
        horizon=shards.num_samples,
    )
    return Prefetch(ahead, reader.fetch, reader.stop)
