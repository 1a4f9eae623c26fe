"""A folder of indexed tars as one data set.

`dataset.json` is written after all tars and sidecars, so a folder that has it is complete. Its fingerprint
is a function of the shards' names, sizes, counts and checksums: copying a data set keeps it, changing one
byte changes it. A trainer keeps the fingerprint beside its position in the stream.

The folder may lie behind an address (`http://host/dir`, see remote.py). Only its `dataset.json` is read then,
and what it says is believed; the tars are compared with it when they come.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from .cache import Cache
from .cached import CachedShards
from .index import NO_LABEL, Index, build_index, index_path, is_sidecar, list_tars, load_index
from .remote import Remote, place_of
from .writer import ShardWriter, write_atomically, write_shard

__all__ = [
    "ShardSet",
    "ShardWriter",
    "build_index",
    "index_shards",
    "write_atomically",
    "write_dataset_card",
    "write_shard",
]

CARD = "dataset.json"
_FORMAT = 1


@dataclass(frozen=True)
class ShardSet:
    """A complete data set: its shards in the order of their names, and what its card says."""

    folder: Path | str  # or its address
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    extensions: tuple[str, ...]
    fingerprint: str
    labels: dict[int, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    source: str = ""
    num_bytes: tuple[int, ...] = ()  # of each tar
    remote: CachedShards | None = field(default=None, compare=False)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        cache: Path | None = None,
        cache_bytes: int | None = None,
        tries: int = 8,
        first_delay_s: float = 0.25,
    ) -> Self:
        """Open a data set without reading its samples.

        The other arguments are for a data set behind an address: the local folder that holds its shards, at
        most so many bytes of them (see `Cache.of`), how often a failed read is tried, and the longest delay
        before the second try.

        Raises `ValueError` for a folder that is missing, empty, not indexed, or changed since it was
        indexed, `OSError` for an address that cannot be read.
        """
        folder = place_of(folder)
        if isinstance(folder, str):
            remote = Remote(folder, tries=tries, first_delay_s=first_delay_s)
            card = _parsed_card(remote.read(CARD, _whole_json), f"{folder}/{CARD}", folder)
            _check_names(card, folder)
            store = CachedShards(remote, Cache.of(cache, cache_bytes), fingerprint=card["fingerprint"])
            return cls._of(folder, card, store)
        tars = list_tars(folder)
        command = f"run `driftmap shards index {folder}`"
        for tar in tars:
            if not index_path(tar).is_file():
                raise ValueError(f"{tar} has no index; {command}")
        card = _read_card(folder)
        if card is None:
            raise ValueError(f"{folder} has no {CARD}, so it is not complete; {command}")
        described = {shard["name"]: shard["bytes"] for shard in card["shards"]}
        if changed := sorted(described.keys() ^ {tar.name for tar in tars}):
            raise ValueError(f"{changed[0]} is only in one of {folder} and its {CARD}; {command}")
        for tar in tars:
            if (found := tar.stat().st_size) != described[tar.name]:
                raise ValueError(
                    f"{tar} has {found} bytes but {CARD} says {described[tar.name]}; "
                    f"if the tar is the right one, {command}, else copy it again"
                )
        return cls._of(folder, card, None)

    @classmethod
    def _of(cls, folder: Path | str, card: dict[str, Any], remote: CachedShards | None) -> Self:
        return cls(
            folder=folder,
            shards=tuple(shard["name"] for shard in card["shards"]),
            counts=tuple(shard["count"] for shard in card["shards"]),
            extensions=tuple(card["extensions"]),
            fingerprint=card["fingerprint"],
            labels={int(label): count for label, count in card["labels"].items()},
            info=card["info"],
            licence=card["licence"],
            source=card["source"],
            num_bytes=tuple(shard["bytes"] for shard in card["shards"]),
            remote=remote,
        )

    @property
    def num_samples(self) -> int:
        """The number of samples of all shards."""
        return sum(self.counts)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of the first sample of each shard."""
        return tuple(int(start) for start in np.cumsum((0, *self.counts))[:-1])

    def load_index(self, shard: int, *, stop: threading.Event | None = None) -> Index:
        """Load the sidecar of the shard with this number; `stop` ends waiting for the network."""
        name, count = self.shards[shard], self.counts[shard]
        if self.remote is not None:
            return self.remote.load_index(name, count=count, num_bytes=self.num_bytes[shard], stop=stop)
        return load_index(Path(self.folder) / name)


def index_shards(
    folder: Path | str,
    *,
    info: dict[str, Any] | None = None,
    licence: str | None = None,
    source: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Build every missing or stale sidecar of a folder, then its `dataset.json`; return the data set.

    Where `info`, `licence` or `source` is left out, what an earlier `dataset.json` says is kept. `progress`
    is called with the number of tars done.

    Raises `ValueError` for a tar that cannot be indexed; it names the tar.
    """
    folder = Path(folder)
    for number, tar in enumerate(list_tars(folder), start=1):
        if index_path(tar).is_file() and not is_sidecar(index_path(tar)):
            raise ValueError(f"{index_path(tar)} was written by another program; move it away")
        if not _is_fresh(tar):
            build_index(tar)
        if progress is not None:
            progress(number)
    card = _read_card(folder) or {"info": {}, "licence": "", "source": ""}
    write_dataset_card(
        folder,
        card["info"] if info is None else info,
        licence=card["licence"] if licence is None else licence,
        source=card["source"] if source is None else source,
    )
    return ShardSet.open(folder)


def write_dataset_card(folder: Path, info: dict[str, Any], *, licence: str = "", source: str = "") -> Path:
    """Describe a folder of indexed tars in its `dataset.json` and return the path of that file.

    `info` is free: class names, or which encoder made the latents. It must be JSON.
    """
    digest = hashlib.sha256()
    shards: list[dict[str, Any]] = []
    extensions: set[str] = set()
    labels: dict[int, int] = {}
    for tar in list_tars(folder):
        index = load_index(tar)
        digest.update(f"{tar.name}\0{index.tar_bytes}\0{len(index)}\0".encode())
        digest.update(index.crcs.astype("<u4").tobytes())
        shards.append({"name": tar.name, "count": len(index), "bytes": index.tar_bytes})
        extensions.update(index.extensions)
        found, times = np.unique(index.labels[index.labels != NO_LABEL], return_counts=True)
        for label, count in zip(found.tolist(), times.tolist(), strict=True):
            labels[label] = labels.get(label, 0) + count
    card = {
        "format": _FORMAT,
        "num_samples": sum(shard["count"] for shard in shards),
        "extensions": sorted(extensions),
        "labels": {str(label): count for label, count in sorted(labels.items())},
        "fingerprint": digest.hexdigest(),
        "licence": licence,
        "source": source,
        "info": info,
        "shards": shards,
    }
    path = folder / CARD
    write_atomically(path, json.dumps(card, indent=1).encode() + b"\n")
    return path


def _is_fresh(tar: Path) -> bool:
    try:
        load_index(tar)
    except ValueError:
        return False
    return True


def _read_card(folder: Path) -> dict[str, Any] | None:
    path = folder / CARD
    if not path.is_file():
        return None
    return _parsed_card(path.read_bytes(), path, folder)


def _parsed_card(data: bytes, path: Path | str, folder: Path | str) -> dict[str, Any]:
    try:
        card = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it and index {folder} again") from error
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise ValueError(
            f"{path} was not written by this version of Driftmap; move it away, "
            f"then run `driftmap shards index {folder}`"
        )
    return card


def _whole_json(data: bytes) -> bytes:
    json.loads(data)
    return data


def _check_names(card: dict[str, Any], address: str) -> None:
    """Raise `ValueError` where names that a server gives would lead out of the folder of the cache."""
    names = [shard["name"] for shard in card["shards"]]
    bad = [name for name in names if not re.fullmatch(r"[^./\\\0][^/\\\0]*\.tar", name)]
    if bad or not re.fullmatch(r"[0-9a-f]{64}", card["fingerprint"]):
        wrong = f"the shard name {bad[0]!r}" if bad else f"the fingerprint {card['fingerprint']!r}"
        raise ValueError(f"{address}/{CARD} holds {wrong}; index the folder again")
