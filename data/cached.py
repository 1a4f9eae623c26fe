"""The shards of one data set behind an address, through the cache of this node.

The fingerprint of the data set, a function of its contents, names the folder of the cache, so two addresses
of one data set share it. Sidecars and shards come when they are first needed, and stay while there is room.

Nothing is believed before it is checked: a sidecar is a zip archive with checksums of its own and has to
agree with `dataset.json`, a shard must have the size and every member the checksum of its sidecar, and each
sample is compared with its checksum again whenever it is read.
"""

import io
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from .cache import Cache
from .index import Index, index_path, read_index
from .remote import Remote

Span = tuple[int, int, int]  # offset, size, checksum
_REQUEST_BYTES = 2**16  # come in about the time that a request takes


class CachedShards:
    """The sidecars and samples of one remote data set, through the cache of this node."""

    def __init__(self, remote: Remote, cache: Cache, *, fingerprint: str) -> None:
        self.remote, self.cache = remote, cache
        self.folder = cache.folder / fingerprint[:32]
        self.spared: tuple[Path, ...] = (self.folder,)  # what is read in turn with these shards
        self.traffic = remote.traffic
        self._failures: dict[str, OSError] = {}  # the last of each shard

    def stats(self) -> dict[str, int]:
        """Return what went over the network so far."""
        return asdict(self.traffic)

    def load_index(
        self, shard: str, *, count: int, num_bytes: int, stop: threading.Event | None = None
    ) -> Index:
        """Return the sidecar of a shard that has so many samples and bytes."""
        file = index_path(self.folder / shard)

        def check(data: bytes) -> tuple[bytes, Index]:
            if data[:2] != b"PK":
                raise ValueError(f"{file.name} is no sidecar of Driftmap")
            index = read_index(io.BytesIO(data), file.name, remedy="index the folder again")
            if (len(index), index.tar_bytes) != (count, num_bytes):
                raise ValueError(f"{file.name} does not belong to the shard that dataset.json describes")
            return data, index

        with self.cache.lock(file, stop):
            if file.is_file():
                try:
                    return check(file.read_bytes())[1]
                except ValueError:
                    file.unlink()
            data, index = self.remote.read(file.name, check, stop=stop)
            temporary = self.cache.reserve(file, len(data))
            if temporary is not None:
                temporary.write_bytes(data)
                self.cache.keep(temporary, file)
            return index

    def fetch(
        self, shard: str, index: Index, *, evict: bool = True, stop: threading.Event | None = None
    ) -> bool:
        """Bring a shard into the cache unless it is there; return False if there is no room for it.

        `evict=False` takes the room from other data sets only. A thread that has waited while another one
        tried in vain does not try again.
        """
        file = self.folder / shard
        if self.cache.holds(file, index.tar_bytes):
            return True
        before = self._failures.get(shard)
        with self.cache.lock(file, stop):
            if self.cache.holds(file, index.tar_bytes):  # another thread or process was faster
                return True
            if (failure := self._failures.get(shard)) is not None and failure is not before:
                raise failure
            temporary = self.cache.reserve(file, index.tar_bytes, spare=() if evict else self.spared)
            if temporary is None:
                return False
            try:
                self.remote.download(
                    shard,
                    temporary,
                    num_bytes=index.tar_bytes,
                    check=lambda: _check_members(temporary, index),
                    stop=stop,
                )
                # Not synced: a crash of the machine leaves bytes that every reader would notice.
                self.cache.keep(temporary, file)
                self.traffic.count("downloads")
            except OSError as error:
                self._failures[shard] = error
                raise
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def read(
        self,
        shard: str,
        index: Index,
        spans: Sequence[Span],
        *,
        evict: bool = True,
        stop: threading.Event | None = None,
    ) -> list[bytes]:
        """Return the bytes of some members, each compared with its checksum."""
        file = self.folder / shard
        descriptor = self.cache.open(file, index.tar_bytes)
        self.traffic.count("cache_hits" if descriptor is not None else "cache_misses")
        for _ in range(2):
            if descriptor is None and self.fetch(shard, index, evict=evict, stop=stop):
                descriptor = self.cache.open(file, index.tar_bytes)
            if descriptor is None:  # no room for it, or other processes need the room at once
                break
            try:
                members = [os.pread(descriptor, size, offset) for offset, size, _ in spans]
            finally:
                os.close(descriptor)
                descriptor = None
            if are_whole(members, spans):
                return members
            file.unlink(missing_ok=True)  # spoiled since it was checked
        return self.read_ranges(shard, spans, stop=stop)

    def holds(self, shard: str, index: Index) -> bool:
        """Return whether a shard is in the cache."""
        return self.cache.holds(self.folder / shard, index.tar_bytes)

    def keep(self, shards: Iterable[tuple[str, int]]) -> None:
        """Count shards of these names and bytes as just used, where they are in the cache."""
        for shard, num_bytes in shards:
            self.cache.holds(self.folder / shard, num_bytes)

    def read_ranges(
        self, shard: str, spans: Sequence[Span], *, stop: threading.Event | None = None
    ) -> list[bytes]:
        """Return the bytes of some members, read from the address alone."""
        asked = [span for span in spans if span[1]]
        groups = [asked] if asked and _are_close(asked) else [[span] for span in asked]
        found = {
            span: data
            for group in groups
            for span, data in zip(group, self._read_range(shard, group, stop), strict=True)
        }
        return [found.get(span, b"") for span in spans]

    def _read_range(self, shard: str, spans: Sequence[Span], stop: threading.Event | None) -> list[bytes]:
        """Return members that lie close to each other, with one request."""
        begin = min(offset for offset, _, _ in spans)
        end = max(offset + size for offset, size, _ in spans)

        def check(data: bytes) -> list[bytes]:
            if len(data) != end - begin:
                raise ConnectionError(
                    f"{len(data)} bytes came instead of the {end - begin} from byte {begin} on (a server "
                    "without range reads needs a cache, data.cache_bytes, that holds a whole shard)"
                )
            members = [data[offset - begin : offset - begin + size] for offset, size, _ in spans]
            if not are_whole(members, spans):
                raise ConnectionError(f"wrong checksum in the {end - begin} bytes from byte {begin} on")
            return members

        self.traffic.count("range_reads")
        return self.remote.read(shard, check, span=(begin, end), stop=stop)


def _are_close(spans: Sequence[Span]) -> bool:
    """Return whether reading what lies between members costs less than asking for each of them."""
    begin = min(offset for offset, _, _ in spans)
    end = max(offset + size for offset, size, _ in spans)
    return end - begin <= 2 * sum(size for _, size, _ in spans) + _REQUEST_BYTES


def are_whole(members: Sequence[bytes], spans: Sequence[Span]) -> bool:
    """Return whether all members have the checksums of their spans."""
    return all(crc32(data) == span[2] for data, span in zip(members, spans, strict=True))


def _check_members(file: Path, index: Index) -> None:
    """Raise `ConnectionError` if a member of a downloaded shard has not the checksum of its sidecar."""
    if not index.tar_bytes:
        return
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory,
        memoryview(memory) as view,
    ):
        for row, column in zip(*(index.sizes > 0).nonzero(), strict=True):
            offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
            if crc32(view[offset : offset + size]) != index.crcs[row, column]:
                extension = index.extensions[column]
                raise ConnectionError(f"wrong checksum of {index.key(row)}.{extension}")
