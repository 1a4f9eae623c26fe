"""Batches read ahead in a thread: what the exact and the resampled order have in common."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Self

from .decode import Batch

_PATIENCE_S = 5.0  # for a thread that waits for bytes which do not come


class ReadAhead:
    """An endless iterator over batches that a thread makes ahead.

    `position` is the stream position after the last batch that was handed out, whatever the thread has read
    beyond it; `wait_s` is the time spent waiting for batches.
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
        self._waiting: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._error: BaseException | None = None

    def begin(self, make: Callable[[], Generator[Batch]], others: Sequence[threading.Thread] = ()) -> None:
        """Start the thread; `others` end with it.

        What `make` returns holds no reference to this object, so dropping the object, or leaving the
        interpreter, ends the threads too.
        """
        thread = threading.Thread(
            target=_fill,
            args=(self._waiting, self.stopped, make),
            name="driftmap batches",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _stop, self.stopped, [thread, *others])
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Hand out the next batch, and move `position` behind it; an error is raised again and again."""
        began = time.perf_counter()
        while self._error is None:
            if self.stopped.is_set():
                raise RuntimeError("these batches are closed; make new ones with start=position")
            try:
                item = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            if not isinstance(item, BaseException):
                self.wait_s += time.perf_counter() - began
                self.position += self._batch_size
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Stop reading ahead; closing twice does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fill(waiting: queue.Queue, stopped: threading.Event, make: Callable[[], Generator[Batch]]) -> None:
    try:
        batches = make()
        try:
            while _put(waiting, stopped, next(batches)):
                pass
        finally:
            batches.close()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer has to see it
        _put(waiting, stopped, error)


def _put(waiting: queue.Queue, stopped: threading.Event, item: Batch | BaseException) -> bool:
    """Wait for room; return whether the consumer still wants batches."""
    while not stopped.is_set():
        try:
            waiting.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _stop(stopped: threading.Event, threads: Sequence[threading.Thread]) -> None:
    stopped.set()
    for thread in threads:
        # The garbage collector may run this in the very thread that is to end.
        if thread is not threading.current_thread():
            thread.join(_PATIENCE_S)
