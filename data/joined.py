"""Several data sets as one: their shards one after the other, with one numbering of all samples."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cached import CachedShards
from .labels import CLASS, names_of
from .members import PICTURES
from .routed import LocalShards, RoutedShards
from .shards import ShardSet

_KINDS = {
    "moments.npy": "latents",
    "points.npy": "points",
    "trajectory.npy": "trajectories",
    **dict.fromkeys(PICTURES, "pictures"),
}


def join(sets: Sequence[ShardSet]) -> ShardSet:
    """Return data sets as one; latents have the scale of the first, in which all of them are trained on.

    Stored latents are not scaled, so those of one encoder go together whatever scale was measured on them.

    Raises `ValueError` where a data set is there twice, or differs from the first in what it holds: pictures
    or latents, channels, the encoders of latents or captions, whether it has classes, and which.
    """
    first = sets[0]
    if empty := [each.folder for each in sets if not each.num_samples]:
        raise ValueError(f"{empty[0]} holds no samples; leave it out of the mixture")
    for place, other in enumerate(sets):
        if other.fingerprint in {earlier.fingerprint for earlier in sets[:place]}:
            raise ValueError(f"{other.folder} is in the mixture twice; give it once")
    for name, of in _ALIKE.items():
        for other in sets[1:]:
            if (found := of(other)) != (expected := of(first)):
                raise ValueError(
                    f"{other.folder} has {name} {found}, but {first.folder} has {expected}; what is mixed "
                    "has to be alike: encode it again with the same encoder, or give another data set"
                )
    fingerprint = hashlib.sha256(" ".join(each.fingerprint for each in sets).encode()).hexdigest()
    names = tuple(f"{_place(each)}/{shard}" for each in sets for shard in each.shards)
    return ShardSet(
        folder=" + ".join(str(each.folder) for each in sets),
        shards=names,
        counts=tuple(count for each in sets for count in each.counts),
        extensions=tuple(sorted({extension for each in sets for extension in each.extensions})),
        fingerprint=fingerprint,
        labels=dict(sum((Counter(each.labels) for each in sets), Counter())),
        info=_joined_info(sets),
        # Local shards take no room in a cache.
        num_bytes=tuple(size if each.remote else 0 for each in sets for size in each.num_bytes),
        remote=_routed(sets, names),
        joined=tuple(len(each.shards) for each in sets),
    )


def _kinds(shards: ShardSet) -> str:
    return " and ".join(sorted({_KINDS[name] for name in shards.extensions if name in _KINDS})) or "nothing"


_ALIKE: dict[str, Callable[[ShardSet], Any]] = {
    "members of": _kinds,
    "channels": lambda shards: shards.info.get("channels", 3) if "pictures" in _kinds(shards) else None,
    "the encoder": lambda shards: shards.info.get("encoder"),
    "the text encoder": lambda shards: shards.info.get("text", {}).get("encoder"),
    "trajectories at": lambda shards: shards.info.get("trajectories", {}).get("times"),
    "trajectories along": lambda shards: shards.info.get("trajectories", {}).get("path"),
    "the standardisation": lambda shards: shards.info.get("table"),
    "class labels:": lambda shards: bool(shards.labels),
    "classes": lambda shards: names_of(shards.info, CLASS),
}


def _place(shards: ShardSet) -> str:
    """Return where the shards of a data set lie, from anywhere."""
    return str(shards.folder if isinstance(shards.folder, str) else shards.folder.absolute())


def _joined_info(sets: Sequence[ShardSet]) -> dict[str, Any]:
    """Return what is true of all, with the latents' scale of the first and the buckets of each in turn."""
    first, *others = (each.info for each in sets)
    info = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    for made in ("latents", "trajectories"):
        if made in first:
            info[made] = first[made]
    if "text" in first:
        info["text"] = {**first["text"], "max_tokens": max(each.info["text"]["max_tokens"] for each in sets)}
    sizes = {each.info.get("size") for each in sets} - {None}
    if len(sizes) > 1 or any("buckets" in each.info for each in sets):
        info["buckets"] = [run for each in sets for run in _runs(each)]
    return info


def _runs(shards: ShardSet) -> list[list[int]]:
    """Return the buckets of a data set, one where its pictures have one size."""
    if "buckets" in shards.info:
        return shards.info["buckets"]
    if (size := shards.info.get("size")) is None:
        raise ValueError(
            f"the card of {shards.folder} says no size, but the mixture has several; make it by "
            "`driftmap shards make`, which writes its size down"
        )
    return [[size, size, shards.num_samples]]


def _routed(sets: Sequence[ShardSet], names: Sequence[str]) -> RoutedShards | None:
    """Return what leads from each name to its data set; local data sets alone need none."""
    if all(each.remote is None for each in sets):
        return None
    stores: list[CachedShards | LocalShards] = []
    for each in sets:
        assert not isinstance(each.remote, RoutedShards)
        stores.append(each.remote or LocalShards(Path(each.folder)))
    found = [(store, shard) for each, store in zip(sets, stores, strict=True) for shard in each.shards]
    return RoutedShards(dict(zip(names, found, strict=True)))
