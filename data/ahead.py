"""Batches read ahead in a thread: what the exact and the resampled order have in common."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Self

from .decode import Batch

_PATIENCE_S = 5.0  # for a thread that waits for bytes which do not come
_LOOK_S = 0.1  # how often who waits looks whether the batches are closed
_PAUSE_S = 0.005  # of the thread, where batches are taken faster than they are made


class ReadAhead:
    """An endless iterator over batches that a thread makes ahead.

    Who finds none ready makes the next one: handing a batch from one thread to another costs as much as
    reading some of it. `position` is the stream position after the last batch that was handed out, whatever
    has been read beyond it; `wait_s` is the time spent waiting for batches.
    """

    def __init__(self, batch_size: int, *, start: int, prefetch: int) -> None:
        if start < 0:
            raise ValueError(f"start is {start}; a stream begins at position 0")
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least one batch is read ahead")
        self.position = start
        self.wait_s = 0.0
        self.stopped = threading.Event()
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._error: BaseException | None = None

    def begin(self, make: Callable[[], Generator[Batch]], others: Sequence[threading.Thread] = ()) -> None:
        """Start the thread; `others` end with it.

        What `make` returns holds no reference to this object, so dropping the object, or leaving the
        interpreter, ends the threads too.
        """
        self._making = _Making(make, self._prefetch, self.stopped)
        thread = threading.Thread(target=self._making.fill, name="driftmap batches", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self.stopped, [thread, *others])
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Hand out the next batch, and move `position` behind it; an error is raised again and again."""
        began = time.perf_counter()
        if self._error is not None:
            raise self._error
        try:
            batch = self._making.take()
        except BaseException as error:
            self._error = error
            raise
        self.wait_s += time.perf_counter() - began
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Stop reading ahead; closing twice does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Making:
    """Batches in their order, made by whichever of two threads holds the lock; at most `prefetch` wait."""

    def __init__(self, make: Callable[[], Generator[Batch]], prefetch: int, stopped: threading.Event) -> None:
        self._make, self._stopped = make, stopped
        self._batches: Generator[Batch] | None = None
        self._ready: deque[Batch | BaseException] = deque()
        self._room = threading.Semaphore(prefetch)
        self._made_by_taker = False
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Make batches ahead until they are closed; an error is the last thing that is ready."""
        try:
            while not self._stopped.is_set():
                if self._made_by_taker:
                    self._made_by_taker = False
                    self._stopped.wait(_PAUSE_S)
                elif self._room.acquire(timeout=_LOOK_S):
                    with self._lock:
                        self._ready.append(self._next())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer has to see it
            self._ready.append(error)
        finally:
            with self._lock:
                if self._batches is not None:
                    self._batches.close()

    def take(self) -> Batch:
        """Return the next batch, ready or made here."""
        while not self._stopped.is_set():
            if self._ready:
                return self._handed()
            if self._lock.acquire(timeout=_LOOK_S):
                try:
                    if self._ready:
                        return self._handed()
                    self._made_by_taker = True
                    return self._next()
                finally:
                    self._lock.release()
        raise RuntimeError("these batches are closed; make new ones with start=position")

    def _handed(self) -> Batch:
        item = self._ready.popleft()
        self._room.release()
        if isinstance(item, BaseException):
            raise item
        return item

    def _next(self) -> Batch:
        if self._batches is None:
            self._batches = self._make()
        return next(self._batches)


def _stop(stopped: threading.Event, threads: Sequence[threading.Thread]) -> None:
    stopped.set()
    for thread in threads:
        # The garbage collector may run this in the very thread that is to end.
        if thread is not threading.current_thread():
            thread.join(_PATIENCE_S)
