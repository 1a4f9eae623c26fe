"""Batches as tensors, in the order of a plan, read ahead in a thread.

`Batches.position` is the whole state: the stream position after the last batch that was handed out, whatever
the thread has read beyond it. `Batches(..., start=position)` goes on there, on any number of ranks.

Threads and not processes: the bytes of latents are decoded by a copy, and sending them from another process
costs more than that; a second thread would only wait for the first. Pictures are decoded by code that lets
other threads run, so some batches are decoded side by side.
"""

import os
import queue
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch

from .decode import Batch, Decoder, find_decoder, floats
from .plan import Plan, rank_positions
from .prefetch import Ahead, Prefetch
from .reader import Reader
from .samples import Samples
from .shards import ShardSet

_LOOKED_UP = 2048  # positions at a time


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

    A batch holds `index` (stream positions, int64), what the decoder gives (`data`, or `mean` and `std`) in
    the types that it is stored in, and `label` (int64) if the data set has `cls` members.

    `workers` threads decode batches side by side, ahead of the one that hands them over; with 0 that one
    decodes alone. Where it is left out the decoder knows what pays.

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
        workers: int | None = None,
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
        self._samples = Samples(shards, decoder, evict=evict, stop=self._ahead.stopped)
        fetching = _prefetch(self._samples.reader, self.plan, stream, start) if shards.remote else None
        if workers is None:
            workers = min(getattr(decoder, "workers", 0), os.cpu_count() or 1)
        reading = _Reading(self._samples, _shares(self.plan, stream, start), fetching)
        thread = threading.Thread(
            target=_read_ahead,
            args=(self._ahead, reading, workers),
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
        remote = self._samples.reader.shards.remote
        return remote.stats() if remote is not None else {}

    def keys_of(self, index: torch.Tensor) -> list[str]:
        """Return the keys of the samples at these stream positions, for messages about them."""
        samples = self.plan.at(index.detach().cpu().numpy())
        return [self._samples.reader.key(int(sample)) for sample in samples]

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

    `index` is the number of each sample in the data set; `data`, or `mean` and `std`, are float32.
    """
    source = Samples(shards, decoder or find_decoder(shards))
    for start in range(0, shards.num_samples, batch_size):
        numbers = np.arange(start, min(start + batch_size, shards.num_samples), dtype=np.int64)
        batch = source.batch(numbers, index=numbers)
        stored = (torch.uint8, torch.float16, torch.float32, torch.float64)
        yield {name: floats(each) if each.dtype in stored else each for name, each in batch.items()}


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


def _shares(plan: Plan, stream: Stream, start: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
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

    samples: Samples
    shares: Iterator[tuple[int, np.ndarray, np.ndarray]]
    fetching: Prefetch | None

    def next(self) -> Callable[[], Batch]:
        """Go on to the next batch, and return what reads it."""
        start, positions, numbers = next(self.shares)
        if self.fetching is not None:
            self.fetching.advance(start)
        return partial(self.samples.batch, numbers, index=positions)


def _read_ahead(ahead: _Ahead, reading: _Reading, workers: int) -> None:
    try:
        with ThreadPoolExecutor(max(workers, 1), "driftmap decoder") as pool:
            waiting: deque[Future[Batch]] = deque()
            wanted = True
            while wanted:
                while len(waiting) < workers:
                    waiting.append(pool.submit(reading.next()))
                wanted = ahead.put(waiting.popleft().result() if workers else reading.next()())
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
