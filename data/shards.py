"""A folder of indexed tars as one data set.

`dataset.json` (card.py) is written after all tars and sidecars, so a folder that has it is complete. A
trainer keeps its fingerprint beside its position in the stream.

The folder may lie behind an address (`http://host/dir`, see remote.py). Only its `dataset.json` is read then,
and what it says is believed; the tars are compared with it when they come.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from .buckets import Size, buckets_of
from .cache import Cache
from .cached import CachedShards
from .card import CARD, check_names, parse_card, read_card, whole_json, write_dataset_card
from .index import Index, build_index, index_path, is_sidecar, list_tars, load_index
from .labels import CAPTION, CLASS, field_of, known_fields, member_of, names_of
from .remote import Remote, place_of
from .routed import RoutedShards
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
    remote: CachedShards | RoutedShards | None = field(default=None, compare=False)
    label: str = CLASS  # what labels its samples, see labels.py
    joined: tuple[int, ...] = ()  # how many shards each data set has, where several were joined

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
            card = parse_card(remote.read(CARD, whole_json), f"{folder}/{CARD}", folder)
            check_names(card, folder)
            store = CachedShards(remote, Cache.of(cache, cache_bytes), fingerprint=card["fingerprint"])
            return cls._of(folder, card, store)
        tars = list_tars(folder)
        command = f"run `driftmap shards index {folder}`"
        for tar in tars:
            if not index_path(tar).is_file():
                raise ValueError(f"{tar} has no index; {command}")
        card = read_card(folder)
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

    def labelled_by(self, label: str) -> Self:
        """Return the data set with another label for its samples: `cls`, `json:FIELD` or `text`.

        Raises `ValueError` where it has no such label.
        """
        if label == CAPTION and member_of(label) not in self.extensions:
            raise ValueError(
                f"{self.folder} holds no encoded captions for the label {label!r}; make them with "
                "`driftmap shards encode --text-encoder`"
            )
        if label not in (CLASS, CAPTION) and not names_of(self.info, label):
            known = ", ".join(f"json:{name}" for name in known_fields(self.info)) or "none"
            raise ValueError(
                f"the card of {self.folder} has no list {field_of(label) + 's'!r} for the label {label!r}; "
                f"besides cls and text there are {known}"
            )
        return replace(self, label=label)

    @property
    def label_numbers(self) -> Sequence[int]:
        """The numbers that label samples; none of captions."""
        return sorted(self.labels) if self.label == CLASS else range(len(self.label_names))

    @property
    def label_names(self) -> list[str]:
        """The names of the labels, by number, as far as the card knows them."""
        return names_of(self.info, self.label)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of the first sample of each shard."""
        return tuple(int(start) for start in np.cumsum((0, *self.counts))[:-1])

    @cached_property
    def buckets(self) -> dict[Size | None, np.ndarray]:
        """The shards of each size of pictures, or of size None where the card does not tell."""
        return buckets_of(self.info.get("buckets", ()), self.counts, self.folder)

    @property
    def stretches(self) -> list[range]:
        """The samples in stretches of one size of pictures, as far as the card tells them apart."""
        ends = np.cumsum([run[2] for run in self.info.get("buckets", ())] or [self.num_samples]).tolist()
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

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
    card = read_card(folder) or {"info": {}, "licence": "", "source": ""}
    write_dataset_card(
        folder,
        card["info"] if info is None else info,
        licence=card["licence"] if licence is None else licence,
        source=card["source"] if source is None else source,
    )
    return ShardSet.open(folder)


def _is_fresh(tar: Path) -> bool:
    try:
        load_index(tar)
    except ValueError:
        return False
    return True
