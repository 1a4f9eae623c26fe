"""Memory for batches, used again as soon as nobody holds what was in it.

New memory comes from the system page by page, which costs as much as filling it.
"""

import sys
import threading

import numpy as np

_KEPT = 16  # at most; who holds more batches gets new memory
_HELD_HERE = 3  # references to a buffer that nobody uses: the list's, the loop's and getrefcount's own


class Room:
    """Buffers of one size; from any thread."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int) -> np.ndarray:
        """Return a buffer (num_bytes,), uint8, whose views, tensors too, keep it from being used again."""
        with self._lock:
            for buffer in self._buffers:
                if sys.getrefcount(buffer) <= _HELD_HERE and len(buffer) == num_bytes:
                    return buffer[:]
            new = np.empty(num_bytes, np.uint8)
            if self._buffers and len(self._buffers[0]) != num_bytes:
                self._buffers.clear()
            if len(self._buffers) < _KEPT:
                self._buffers.append(new)
            return new[:]
