"""Batches as tensors, in the order of a plan, read ahead in a thread.

`Batches.position` is the whole state: the stream position after the last batch that was handed out, whatever
the thread has read beyond it. `Batches(..., start=position)` goes on there, on any number of ranks.

A thread and not processes: the bytes of latents are decoded by a copy, and sending them from another process
costs more than that. Pictures are decoded by code that lets other threads run.
"""

import queue
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from .decode import Batch, Decoder, decode_batch, find_decoder
from .members import read_label
from .plan import Plan, rank_positions
from .prefetch import Ahead, Prefetch
from .reader import Reader, Sample
from .shards import ShardSet

_LOOKED_UP = 1024  # positions at a time


@dataclass(frozen=True)
class Stream:
    """Which samples go where: the order of the stream, and this rank's share of each global batch.

    `batch_size` is the global one.
    """

    batch_size: int
    seed: int
    window: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank}; expected 0 to {self.world - 1}")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(
                f"batch_size is {self.batch_size} over {self.world} ranks; "
                f"expected a positive multiple of {self.world}"
            )


class Batches:
    """An endless iterator of this rank's part of each global batch.

    A batch holds `index` (stream positions, int64), what the decoder gives (`data`, or `mean` and `std`),
    and `label` (int64) if the data set has `cls` members.

    `next` raises `ValueError` for a sample that cannot be read or decoded; it names the shard and the key.
    """

    def __init__(
        self,
        shards: ShardSet,
        stream: Stream,
        *,
        decoder: Decoder | None = None,
        start: int = 0,
        prefetch: int = 4,
    ) -> None:
        if start < 0:
            raise ValueError(f"start is {start}; a stream begins at position 0")
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least one batch is read ahead")
        self.stream = stream
        self.plan = Plan(shards.counts, stream.seed, stream.window)
        self.position = start
        self.wait_s = 0.0
        self._ahead = _Ahead(prefetch)
        evict = shards.remote is None or _window_fits(shards, stream.window)
        decoder = decoder or find_decoder(shards)
        self._source = _Source(shards, decoder, evict=evict, stop=self._ahead.stopped)
        fetching = _prefetch(self._source.reader, self.plan, stream, start) if shards.remote else None
        thread = threading.Thread(
            target=_read_ahead,
            args=(self._ahead, self._source, self.plan, stream, start, fetching),
            name="driftmap batches",
            daemon=True,
        )
        # The thread holds no reference to this object, so dropping the object, or leaving the interpreter,
        # ends the thread too.
        self._finalizer = weakref.finalize(
            self, _stop, self._ahead, [thread, *(fetching.threads if fetching else ())]
        )
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Hand out the next batch, and move `position` behind it."""
        began = time.perf_counter()
        item = self._ahead.get()
        self.wait_s += time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        self.position += self.stream.batch_size
        return item

    @property
    def reader_stats(self) -> dict[str, int]:
        """What went over the network, failed there or was in the cache; empty for a local folder."""
        remote = self._source.reader.shards.remote
        return remote.stats() if remote is not None else {}

    def keys_of(self, index: torch.Tensor) -> list[str]:
        """Return the keys of the samples at these stream positions, for messages about them."""
        samples = self.plan.at(index.detach().cpu().numpy())
        return [self._source.reader.key(int(sample)) for sample in samples]

    def close(self) -> None:
        """Stop reading ahead; closing twice does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ordered(shards: ShardSet, batch_size: int, *, decoder: Decoder | None = None) -> Iterator[Batch]:
    """Yield every sample once in the order of the data set, for evaluation; the last batch may be short.

    `index` is the number of each sample in the data set.
    """
    source = _Source(shards, decoder or find_decoder(shards))
    for start in range(0, shards.num_samples, batch_size):
        samples = np.arange(start, min(start + batch_size, shards.num_samples), dtype=np.int64)
        yield source.batch(samples, index=samples)


class _Source:
    """Reads and decodes the samples of a batch and stacks them."""

    def __init__(
        self,
        shards: ShardSet,
        decoder: Decoder,
        *,
        evict: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        self._decoder = decoder
        self._has_label = "cls" in shards.extensions
        self.reader = Reader(shards, extensions={*decoder.extensions, "cls"}, evict=evict, stop=stop)

    def batch(self, numbers: np.ndarray, *, index: np.ndarray) -> Batch:
        samples = [self.reader.read(int(number)) for number in numbers]
        batch = {"index": torch.from_numpy(index), **decode_batch(samples, self._decoder)}
        if self._has_label:
            batch["label"] = torch.tensor([_label(sample) for sample in samples], dtype=torch.int64)
        return batch


class _Ahead:
    """The batches between the thread and its consumer."""

    def __init__(self, size: int) -> None:
        self._items: queue.Queue[Batch | BaseException] = queue.Queue(size)
        self.stopped = threading.Event()
        self._error: BaseException | None = None

    def put(self, item: Batch | BaseException) -> bool:
        """Wait for room; return whether the consumer still wants batches."""
        while not self.stopped.is_set():
            try:
                self._items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def get(self) -> Batch | BaseException:
        """Wait for the next batch; an error is returned again and again."""
        while self._error is None:
            if self.stopped.is_set():
                raise RuntimeError("these batches are closed; make new ones with start=position")
            try:
                item = self._items.get(timeout=0.1)
            except queue.Empty:
                continue
            if not isinstance(item, BaseException):
                return item
            self._error = item
        return self._error

    def stop(self) -> None:
        self.stopped.set()


def _read_ahead(
    ahead: _Ahead, source: _Source, plan: Plan, stream: Stream, start: int, fetching: Prefetch | None
) -> None:
    try:
        wanted = True
        while wanted:
            if fetching is not None:
                fetching.advance(start)
            index = rank_positions(start, stream.batch_size, rank=stream.rank, world=stream.world)
            wanted = ahead.put(source.batch(plan.at(index), index=index))
            start += stream.batch_size
    except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer has to see it
        ahead.put(error)


def _window_fits(shards: ShardSet, window: int) -> bool:
    """Return whether the shards that are read in turn fit into the cache together, and warn if not."""
    assert shards.remote is not None
    window = window or len(shards.shards)
    needed = sum(sorted(shards.num_bytes)[-window:])
    if needed <= shards.remote.cache.max_bytes:
        return True
    warnings.warn(
        f"the {window} shards of {shards.folder} that are shuffled together have {needed} bytes, but their "
        f"cache holds {shards.remote.cache.max_bytes}: samples of the others are read one by one, which is "
        "slow; set data.window to fewer shards, or data.cache_bytes higher",
        stacklevel=3,
    )
    return False


def _prefetch(reader: Reader, plan: Plan, stream: Stream, start: int) -> Prefetch:
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


def _stop(ahead: _Ahead, threads: list[threading.Thread]) -> None:
    ahead.stop()
    for thread in threads:
        # The garbage collector may run this in the very thread that is to end.
        if thread is not threading.current_thread():
            thread.join()


def _label(sample: Sample) -> int:
    if "cls" not in sample.members:
        raise ValueError(f"{sample.name}: there is no cls, which other samples of the data set have")
    try:
        return read_label(sample.members["cls"])
    except ValueError as error:
        raise ValueError(f"{sample.name}: {error}") from error
