"""The bytes of one sample.

Shards are mapped into memory when they are first touched, so that the operating system's page cache is the
only cache. At most `max_open` shards are mapped at a time; a process may not open any number of files.
"""

import bisect
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .index import Index
from .shards import ShardSet


@dataclass(frozen=True)
class Sample:
    """One sample: where it is from, and the bytes of its members by extension."""

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def name(self) -> str:
        """What an error message calls it."""
        return f"{self.shard}: {self.key}"


class Reader:
    """Reads samples by their number in the data set, from any thread.

    `extensions` limits what is read. `verify` compares each member with its checksum, which costs
    less than decoding it.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        extensions: Collection[str] | None = None,
        verify: bool = True,
        max_open: int = 256,
    ) -> None:
        self.shards = shards
        self.verify = verify
        self.max_open = max_open
        self._extensions = extensions
        self._indices: dict[int, Index] = {}
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int) -> Sample:
        """Read one sample.

        Raises `ValueError` for a shard of another size than its index says, or for a member that has
        changed (with `verify`); it names the shard, and the key of the member.
        """
        shard, row = self._locate(sample)
        index, memory = self._opened(shard)
        members: dict[str, bytes] = {}
        for column, extension in enumerate(index.extensions):
            if self._extensions is not None and extension not in self._extensions:
                continue
            size = int(index.sizes[row, column])
            if size >= 0:
                offset = int(index.offsets[row, column])
                members[extension] = memory[offset : offset + size]
        result = Sample(index.key(row), self.shards.shards[shard], members)
        if self.verify:
            _verify(result, index, row)
        return result

    def key(self, sample: int) -> str:
        """Return the key of one sample without reading it."""
        shard, row = self._locate(sample)
        return self._index(shard).key(row)

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < self.shards.num_samples:
            raise ValueError(f"sample {sample} of {self.shards.num_samples} in {self.shards.folder}")
        shard = bisect.bisect_right(self.shards.starts, sample) - 1
        return shard, sample - self.shards.starts[shard]

    def _index(self, shard: int) -> Index:
        with self._lock:
            if shard not in self._indices:
                self._indices[shard] = self.shards.load_index(shard)
            return self._indices[shard]

    def _opened(self, shard: int) -> tuple[Index, mmap.mmap]:
        index = self._index(shard)
        with self._lock:
            memory = self._maps.get(shard)
            if memory is None:
                memory = _map(self.shards.folder / self.shards.shards[shard], index.tar_bytes)
                self._maps[shard] = memory
                if len(self._maps) > self.max_open:
                    # Not closed here, as another thread may still be reading from it.
                    self._maps.popitem(last=False)
            self._maps.move_to_end(shard)
        return index, memory


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    with open(path, "rb") as file:
        if (found := os.fstat(file.fileno()).st_size) != num_bytes:
            raise ValueError(
                f"{path} has {found} bytes but had {num_bytes} when it was indexed; copy it again"
            )
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _verify(sample: Sample, index: Index, row: int) -> None:
    for extension, data in sample.members.items():
        if zlib.crc32(data) != index.crcs[row, index.extensions.index(extension)]:
            raise ValueError(
                f"{sample.name}: {extension} has changed since it was indexed (checksum); "
                "copy the shard again"
            )
