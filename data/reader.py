"""The bytes of one sample.

Shards are mapped into memory when they are first touched, so that the operating system's page cache is the
only cache. At most `max_open` shards are mapped at a time; a process may not open any number of files.

Shards behind an address are brought into a local folder first, and opened for each sample alone: the folder
is bounded, and what is open in any process of the node may not be removed from it.
"""

import bisect
import contextlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from .cached import CachedShards
from .checksum import crc_of_rows
from .index import NO_LABEL, Index, index_path, read_index
from .lookup import Lookup
from .members import Bytes
from .room import Room
from .routed import RoutedShards
from .shards import ShardSet

_BLOCK = 512  # bytes: members of a tar begin at whole blocks, and zeros fill their last one
_PLACE = np.dtype([("offset", np.int64), ("size", np.int64), ("crc", np.uint32)], align=True)
_FACTS = np.dtype([("label", np.int64), ("finite", bool)], align=True)


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
        self._facts = Lookup(shards, _FACTS, self._facts_of)
        self._places: dict[str, Lookup] = {}
        self._room = Room()
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

    def members(self, samples: np.ndarray, extension: str) -> Iterator[Bytes]:
        """Read one member of many samples of a local data set, as views of its tars: nothing is copied.

        Raises `ValueError` as `read` does, and for a sample without the member.
        """
        shards, places = self._lookup(extension)(samples)
        views = {shard: memoryview(self._opened(shard)[1]) for shard in np.unique(shards).tolist()}
        for number, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            offset, size, crc = place
            if size < 0:
                raise self._without(int(samples[number]), extension)
            member = views[shard][offset : offset + size]
            if self.verify and crc32(member) != crc:
                raise _changed(self.name(int(samples[number])), extension)
            yield member

    def rows(self, samples: np.ndarray, extension: str) -> np.ndarray | None:
        """Read one member of many samples of a local data set that are of one size: (n, size), uint8.

        Samples of a shard that follow one another here, as in ascending order, are copied at once, without
        the interpreter's lock. Returns nothing where `read` has to look at each of them: their sizes differ,
        or one has changed.
        """
        shards, places = self._lookup(extension)(samples)
        size, (firsts, inside) = int(places["size"][0]), np.divmod(places["offset"], _BLOCK)
        if size < 0 or (places["size"] != size).any() or inside.any():
            return None
        long = -(-size // _BLOCK)
        blocks = (firsts[:, None] + np.arange(long)).reshape(-1)
        copied = self._room(len(blocks) * _BLOCK).reshape(-1, _BLOCK)
        found, ends = 0, [*(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(samples)]
        for begin, end in zip([0, *ends], ends, strict=False):
            index, memory = self._opened(int(shards[begin]))
            whole = np.frombuffer(memory, np.uint8, index.tar_bytes // _BLOCK * _BLOCK).reshape(-1, _BLOCK)
            part = slice(begin * long, end * long)
            # "clip" copies straight to its place; a block beyond the end is found by its checksum.
            whole.take(blocks[part], axis=0, out=copied[part], mode="clip")
            found = crc32(copied[part].data, found) if self.verify else 0
        if self.verify and found != crc_of_rows(places["crc"], size=size, width=long * _BLOCK):
            return None
        return copied.reshape(len(samples), -1)[:, :size]

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Return the classes of samples, from the indices.

        Raises `ValueError` for a sample that has none, or whose `cls` is no number.
        """
        labels = self._facts(samples)[1]["label"]
        if (missing := np.flatnonzero(labels == NO_LABEL)).size:
            sample = self.read(int(samples[missing[0]]))
            if "cls" not in sample.members:
                raise self._without(int(samples[missing[0]]), "cls")
            found = bytes(sample.members["cls"][:20])
            raise ValueError(f"{sample.name}: cls is {found!r}; expected the number of a class")
        return labels

    def not_finite(self, samples: np.ndarray) -> str | None:
        """Return the name of the first of these samples whose arrays hold numbers that are not finite."""
        bad = np.flatnonzero(~self._facts(samples)[1]["finite"])
        return self.name(int(samples[bad[0]])) if bad.size else None

    def name(self, sample: int) -> str:
        """Return what an error message calls a sample, without reading it."""
        return f"{self.shards.shards[self._locate(sample)[0]]}: {self.key(sample)}"

    def key(self, sample: int) -> str:
        """Return the key of one sample without reading it."""
        shard, row = self._locate(sample)
        return self.index(shard).key(row)

    def key_or_row(self, sample: int) -> str:
        """Return the key of a sample whose shard cannot be read; its row if its sidecar is not here."""
        shard, row = self._locate(sample)
        if shard not in self._indices and self.shards.remote is None:
            path = index_path(Path(self.shards.folder) / self.shards.shards[shard])
            with contextlib.suppress(ValueError):
                self._indices[shard] = read_index(path, path, remedy="index the folder again")
        return self._indices[shard].key(row) if shard in self._indices else f"sample {row}"

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

    def _read_remote(self, remote: CachedShards | RoutedShards, shard: int, row: int) -> Sample:
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

    def _lookup(self, extension: str) -> Lookup:
        """Return where the members of an extension lie."""
        if extension not in self._places:
            self._places[extension] = Lookup(self.shards, _PLACE, partial(self._places_of, extension))
        return self._places[extension]

    def _places_of(self, extension: str, shard: int) -> np.ndarray:
        index = self.index(shard)
        rows = np.zeros(len(index), _PLACE)
        if extension not in index.extensions:
            rows["size"] = -1
            return rows
        column = index.extensions.index(extension)
        for name, table in (("offset", index.offsets), ("size", index.sizes), ("crc", index.crcs)):
            rows[name] = table[:, column]
        return rows

    def _facts_of(self, shard: int) -> np.ndarray:
        index = self.index(shard)
        rows = np.empty(len(index), _FACTS)
        rows["label"], rows["finite"] = index.labels, index.finite
        return rows

    def _without(self, sample: int, extension: str) -> ValueError:
        return ValueError(
            f"{self.name(sample)}: there is no {extension}, which other samples of the data set have"
        )

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
        if crc32(data) != index.crcs[row, index.extensions.index(extension)]:
            raise _changed(sample.name, extension)


def _changed(name: str, extension: str) -> ValueError:
    return ValueError(
        f"{name}: {extension} has changed since it was indexed (checksum); copy the shard again"
    )
