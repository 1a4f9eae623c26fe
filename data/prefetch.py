"""Brings the shards that a stream needs next into the cache, in the order of the plan, in threads.

The plan is a pure function, so what comes next is known: positions are looked up ahead of the reader until
enough shards wait, or until the shards from here to there would not fit into the cache together. What is
fetched ahead is therefore still there when it is needed.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

NUM_THREADS = 4
MAX_WAITING = 16  # shards
MAX_STRIDES = 8  # looked up at a time


@dataclass
class Ahead:
    """The shards needed from a position of the stream on, in the order in which they are first needed.

    `shards_at(start, stop)` gives the shards of this rank at positions of the stream, `sizes` are bytes.
    `needed` holds the last position known to need a shard, of every shard between the reader and the cursor.
    """

    shards_at: Callable[[int, int], np.ndarray]
    sizes: Sequence[int]
    max_bytes: int
    stride: int
    cursor: int
    horizon: int
    needed: dict[int, int] = field(default_factory=dict)

    def advance(self, position: int, *, num_waiting: int) -> list[int]:
        """Return shards that are needed beyond what is known already, for a reader at this position."""
        self.needed = {shard: last for shard, last in self.needed.items() if last >= position}
        self.cursor = max(self.cursor, position)
        found: list[int] = []
        for _ in range(MAX_STRIDES):
            if num_waiting + len(found) >= MAX_WAITING or self.cursor >= position + self.horizon:
                break
            there = self._shards_there()
            if sum(self.sizes[shard] for shard in {*self.needed, *there}) > self.max_bytes:
                break  # looked at again when the reader has come nearer
            found += [shard for shard in there if shard not in self.needed]
            self.cursor += self.stride
            self.needed.update(dict.fromkeys(there, self.cursor - 1))
        return found

    def _shards_there(self) -> list[int]:
        """Return the shards of the stride at the cursor."""
        shards, first = np.unique(self.shards_at(self.cursor, self.cursor + self.stride), return_index=True)
        return [int(shard) for shard in shards[np.argsort(first)]]


class Prefetch:
    """Threads that call `fetch(shard, needed)` for one shard after another until `stop` is set.

    `needed` are all the shards from the reader to the last one that waits, and are to be kept.

    An error is dropped here: the reader asks for the shard again when it needs it, and tells of its own.
    """

    def __init__(self, ahead: Ahead, fetch: Callable[[int, list[int]], None], stop: threading.Event) -> None:
        self._ahead, self._fetch, self._stop = ahead, fetch, stop
        self._waiting: list[int] = []
        self._changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._work, name="driftmap prefetch", daemon=True)
            for _ in range(NUM_THREADS)
        ]
        for thread in self.threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Tell where the reader is."""
        with self._changed:
            self._waiting += self._ahead.advance(position, num_waiting=len(self._waiting))
            self._changed.notify_all()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._changed:
                if not self._waiting:
                    self._changed.wait(0.1)
                    continue
                shard = self._waiting.pop(0)
                needed = list(self._ahead.needed)
            with contextlib.suppress(Exception):
                self._fetch(shard, needed)
