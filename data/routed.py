"""The shards of several data sets, some of them behind addresses, by one list of names."""

import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .cache import Cache
from .cached import CachedShards, Span, are_whole
from .index import Index, load_index


class LocalShards:
    """The shards of a local folder, read as those behind an address are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stats(self) -> dict[str, int]:
        """Nothing goes over the network."""
        return {}

    def load_index(
        self, shard: str, *, count: int, num_bytes: int, stop: threading.Event | None = None
    ) -> Index:
        """Return the sidecar of a shard."""
        return load_index(self.folder / shard)

    def fetch(
        self, shard: str, index: Index, *, evict: bool = True, stop: threading.Event | None = None
    ) -> bool:
        """Return that it is here."""
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
        return self.read_ranges(shard, spans)

    def read_ranges(
        self, shard: str, spans: Sequence[Span], *, stop: threading.Event | None = None
    ) -> list[bytes]:
        """Return the bytes of some members; `ValueError` names a shard that has changed."""
        with open(self.folder / shard, "rb") as file:
            members = [os.pread(file.fileno(), size, offset) for offset, size, _ in spans]
        if not are_whole(members, spans):
            raise ValueError(
                f"{self.folder / shard} has changed since it was indexed (checksum); copy it again"
            )
        return members

    def holds(self, shard: str, index: Index) -> bool:
        """Return that it is here."""
        return True

    def keep(self, shards: Iterable[tuple[str, int]]) -> None:
        """Do nothing: it stays."""


class RoutedShards:
    """What `CachedShards` is for one data set, for several: each name leads to its own data set.

    None of them takes room in the cache from another one that is read in turn with it.
    """

    def __init__(self, routes: Mapping[str, tuple[CachedShards | LocalShards, str]]) -> None:
        self._routes = routes
        self._stores = list({id(store): store for store, _ in routes.values()}.values())
        cached = [store for store in self._stores if isinstance(store, CachedShards)]
        for store in cached:
            store.spared = tuple(other.folder for other in cached)
        self.cache: Cache = cached[0].cache

    def stats(self) -> dict[str, int]:
        """Return what went over the network so far, of all."""
        total: Counter[str] = Counter()
        for store in self._stores:
            total.update(store.stats())
        return dict(total)

    def load_index(
        self, shard: str, *, count: int, num_bytes: int, stop: threading.Event | None = None
    ) -> Index:
        """Return the sidecar of a shard that has so many samples and bytes."""
        store, name = self._routes[shard]
        return store.load_index(name, count=count, num_bytes=num_bytes, stop=stop)

    def fetch(
        self, shard: str, index: Index, *, evict: bool = True, stop: threading.Event | None = None
    ) -> bool:
        """Bring a shard into the cache unless it is there; return False if there is no room for it."""
        store, name = self._routes[shard]
        return store.fetch(name, index, evict=evict, stop=stop)

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
        store, name = self._routes[shard]
        return store.read(name, index, spans, evict=evict, stop=stop)

    def read_ranges(
        self, shard: str, spans: Sequence[Span], *, stop: threading.Event | None = None
    ) -> list[bytes]:
        """Return the bytes of some members, read from where the data set lies alone."""
        store, name = self._routes[shard]
        return store.read_ranges(name, spans, stop=stop)

    def holds(self, shard: str, index: Index) -> bool:
        """Return whether a shard need not be brought."""
        store, name = self._routes[shard]
        return store.holds(name, index)

    def keep(self, shards: Iterable[tuple[str, int]]) -> None:
        """Count shards of these names and bytes as just used, where they are in the cache."""
        for shard, num_bytes in shards:
            store, name = self._routes[shard]
            store.keep([(name, num_bytes)])
