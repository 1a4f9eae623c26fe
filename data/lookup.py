"""Facts about samples by their numbers, in one array that is filled a shard at a time."""

from collections.abc import Callable

import numpy as np

from .shards import ShardSet


class Lookup:
    """One row a sample; `rows_of` gives those of a shard, when it is first asked for.

    A look costs the same from however many shards the samples come.
    """

    def __init__(self, shards: ShardSet, kind: np.dtype, rows_of: Callable[[int], np.ndarray]) -> None:
        self._starts = np.array(shards.starts)
        self._rows = np.empty(shards.num_samples, kind)  # takes no memory before it is filled
        self._known = np.zeros(len(shards.counts), bool)
        self._rows_of = rows_of

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each sample, and its row."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        if not self._known[shards].all():
            for shard in np.unique(shards[~self._known[shards]]).tolist():
                rows = self._rows_of(shard)
                self._rows[self._starts[shard] : self._starts[shard] + len(rows)] = rows
                self._known[shard] = True
        return shards, self._rows[samples]
