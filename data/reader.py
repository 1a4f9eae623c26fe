"""The bytes of one sample.

Shards are mapped into memory when they are first touched, so that the operating system's page cache is the
only cache. At most `max_open` shards are mapped at a time; a process may not open any number of files.

Shards behind an address are brought into a local folder first, and opened for each sample alone: the folder
is bounded, and what is open in any process of the node may not be removed from it.
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

from .cached import CachedShards
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

    Of a data set behind an address, `evict=False` says that more shards are read in turn than its cache
    holds, so that those that came first stay there and of others single samples are read. `stop` ends waiting
    for the network. Members that came from there are always compared with their checksums.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        extensions: Collection[str] | None = None,
        verify: bool = True,
        max_open: int = 256,
        evict: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        self.shards = shards
        self.evict = evict
        self.stop = stop
        self.verify = verify
        self.max_open = max_open
        self._extensions = extensions
        self._indices: dict[int, Index] = {}
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()
        self._without_room: set[int] = set()

    def read(self, sample: int) -> Sample:
        """Read one sample.

        Raises `ValueError` for a shard of another size than its index says, or for a member that has
        changed (with `verify`); it names the shard, and the key of the member.
        """
        shard, row = self._locate(sample)
        if self.shards.remote is not None:
            return self._read_remote(self.shards.remote, shard, row)
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
        return self.index(shard).key(row)

    def fetch(self, shard: int, needed: Collection[int]) -> None:
        """Bring a shard behind an address into its cache, rather in place of others than of those needed."""
        assert self.shards.remote is not None
        self.shards.remote.keep((self.shards.shards[other], self.shards.num_bytes[other]) for other in needed)
        self.shards.remote.fetch(
            self.shards.shards[shard], self.index(shard), evict=self.evict, stop=self.stop
        )

    def index(self, shard: int) -> Index:
        """Return the sidecar of a shard."""
        index = self._indices.get(shard)
        if index is None:
            index = self._indices.setdefault(shard, self.shards.load_index(shard, stop=self.stop))
        return index

    def _read_remote(self, remote: CachedShards, shard: int, row: int) -> Sample:
        index = self.index(shard)
        wanted = [
            (extension, (int(index.offsets[row, column]), size, int(index.crcs[row, column])))
            for column, extension in enumerate(index.extensions)
            if (size := int(index.sizes[row, column])) >= 0
            and (self._extensions is None or extension in self._extensions)
        ]
        spans = [span for _, span in wanted]
        name = self.shards.shards[shard]
        if shard in self._without_room:
            data = remote.read_ranges(name, spans, stop=self.stop)
        else:
            data = remote.read(name, index, spans, evict=self.evict, stop=self.stop)
            if not self.evict and not remote.holds(name, index):
                self._without_room.add(shard)
        extensions = [extension for extension, _ in wanted]
        return Sample(index.key(row), name, dict(zip(extensions, data, strict=True)))

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < self.shards.num_samples:
            raise ValueError(f"sample {sample} of {self.shards.num_samples} in {self.shards.folder}")
        shard = bisect.bisect_right(self.shards.starts, sample) - 1
        return shard, sample - self.shards.starts[shard]

    def _opened(self, shard: int) -> tuple[Index, mmap.mmap]:
        index = self.index(shard)
        with self._lock:
            memory = self._maps.get(shard)
            if memory is None:
                memory = _map(Path(self.shards.folder) / self.shards.shards[shard], index.tar_bytes)
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
