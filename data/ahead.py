"""Batches read ahead in threads: what the exact and the resampled order have in common."""

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from .decode import Batch

Job = Callable[[], Batch]  # reads one batch, from any thread
_PATIENCE_S = 5.0  # for a thread that waits for bytes which do not come
_LOOK_S = 0.1  # how often who waits looks whether the batches are closed


class ReadAhead:
    """An endless iterator over batches that threads make ahead, side by side.

    Who finds the next one unfinished makes a later one in place of waiting. `position` is the stream position
    after the last batch that was handed out, whatever has been read beyond it; `wait_s` is the time spent
    waiting for batches.
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

    def begin(
        self,
        jobs: Callable[[], Generator[Job]],
        *,
        num_threads: int = 1,
        others: Sequence[threading.Thread] = (),
    ) -> None:
        """Start the threads, which take `jobs` in their order; `others` end with them.

        What `jobs` returns holds no reference to this object, so dropping the object, or leaving the
        interpreter, ends the threads too.
        """
        self._making = _Making(jobs, self._prefetch, self.stopped)
        threads = [
            threading.Thread(target=self._making.fill, name="driftmap batches", daemon=True)
            for _ in range(num_threads)
        ]
        self._finalizer = weakref.finalize(self, _stop, self.stopped, [*threads, *others])
        for thread in threads:
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
    """Batches in the order of their jobs; at most `prefetch` are being made, or wait.

    After a batch that failed none is begun: nobody could take it.
    """

    def __init__(self, jobs: Callable[[], Generator[Job]], prefetch: int, stopped: threading.Event) -> None:
        self._jobs, self._stopped = jobs(), stopped
        self._queue: deque[Future[Batch]] = deque()
        self._room = threading.Semaphore(prefetch)
        self._lock = threading.Lock()
        self._failed = False

    def fill(self) -> None:
        """Make batches until they are closed."""
        while not (self._stopped.is_set() or self._failed):
            if self._room.acquire(timeout=_LOOK_S):
                self._make_one()
        with self._lock:
            self._jobs.close()

    def take(self) -> Batch:
        """Return the next batch, or raise what it failed with."""
        while not self._stopped.is_set():
            if self._queue and self._queue[0].done():
                self._room.release()
                return self._queue.popleft().result()
            if not self._failed and self._room.acquire(blocking=False):
                self._make_one()
            else:
                self._wait()
        raise RuntimeError("these batches are closed; make new ones with start=position")

    def _make_one(self) -> None:
        """Make the first batch that nobody makes; an error takes its place."""
        made: Future[Batch] = Future()
        try:
            with self._lock:
                self._queue.append(made)
                job = next(self._jobs)
            made.set_result(job())
        except BaseException as error:
            self._failed = True
            made.set_exception(error)
            if not isinstance(error, Exception):
                raise  # of the taker's own thread, such as KeyboardInterrupt: it is not the batch's

    def _wait(self) -> None:
        """Wait for the next batch, which another thread makes or is about to."""
        if not self._queue:
            time.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            self._queue[0].exception(_LOOK_S)


def _stop(stopped: threading.Event, threads: Sequence[threading.Thread]) -> None:
    stopped.set()
    for thread in threads:
        # The garbage collector may run this in the very thread that is to end.
        if thread is not threading.current_thread():
            thread.join(_PATIENCE_S)
