"""`dataset.json`: what a data set says of itself.

Its fingerprint is a function of the shards' names, sizes, counts and checksums: copying a data set keeps it,
changing one byte changes it. `info` is free: names of classes, or which encoder made the latents.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .index import NO_LABEL, Index, list_tars, load_index
from .writer import write_atomically

CARD = "dataset.json"
_FORMAT = 1


def write_dataset_card(folder: Path, info: dict[str, Any], *, licence: str = "", source: str = "") -> Path:
    """Describe a folder of indexed tars in its `dataset.json` and return the path of that file.

    `info` is free: class names, or which encoder made the latents. It must be JSON.
    """
    path = folder / CARD
    indices = ((tar.name, load_index(tar)) for tar in list_tars(folder))
    card = describe(indices, info, licence=licence, source=source)
    write_atomically(path, json.dumps(card, indent=1).encode() + b"\n")
    return path


def describe(
    indices: Iterable[tuple[str, Index]], info: dict[str, Any], *, licence: str = "", source: str = ""
) -> dict[str, Any]:
    """Return what the card says of tars, given by name with their indices."""
    digest = hashlib.sha256()
    shards: list[dict[str, Any]] = []
    extensions: set[str] = set()
    labels: dict[int, int] = {}
    for name, index in indices:
        digest.update(f"{name}\0{index.tar_bytes}\0{len(index)}\0".encode())
        digest.update(index.crcs.astype("<u4").tobytes())
        shards.append({"name": name, "count": len(index), "bytes": index.tar_bytes})
        extensions.update(index.extensions)
        found, times = np.unique(index.labels[index.labels != NO_LABEL], return_counts=True)
        for label, count in zip(found.tolist(), times.tolist(), strict=True):
            labels[label] = labels.get(label, 0) + count
    return {
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


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of a local folder, if it has one; raises as `parse_card` does."""
    path = folder / CARD
    if not path.is_file():
        return None
    return parse_card(path.read_bytes(), path, folder)


def parse_card(data: bytes, path: Path | str, folder: Path | str) -> dict[str, Any]:
    """Return the card in some bytes that were at `path`; raises `ValueError` if they are none."""
    try:
        card = json.loads(data)
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}); run `driftmap shards check {folder} --repair`"
        ) from error
    if not _is_card(card):
        raise ValueError(
            f"{path} is damaged or was not written by this version of Driftmap; "
            f"run `driftmap shards check {folder} --repair`"
        )
    return card


def salvaged(card: Path) -> dict[str, Any] | None:
    """Return what a card says that its tars do not: `info`, `licence` and `source`; nothing if it is lost."""
    try:
        said = json.loads(card.read_bytes())
        told = {"info": said["info"], "licence": said["licence"], "source": said["source"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if [type(value) for value in told.values()] == [dict, str, str] else None


def _is_card(card: object) -> bool:
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        return False
    if not {"extensions", "fingerprint", "info", "labels", "licence", "shards", "source"} <= card.keys():
        return False
    return all({"name", "count", "bytes"} <= shard.keys() for shard in card["shards"])


def whole_json(data: bytes) -> bytes:
    """Return the bytes that came over a network if they are JSON, as those that were cut off are not."""
    json.loads(data)
    return data


def check_names(card: dict[str, Any], address: str) -> None:
    """Raise `ValueError` where names that a server gives would lead out of the folder of the cache."""
    names = [shard["name"] for shard in card["shards"]]
    bad = [name for name in names if not re.fullmatch(r"[^./\\\0][^/\\\0]*\.tar", name)]
    if bad or not re.fullmatch(r"[0-9a-f]{64}", card["fingerprint"]):
        wrong = f"the shard name {bad[0]!r}" if bad else f"the fingerprint {card['fingerprint']!r}"
        raise ValueError(f"{address}/{CARD} holds {wrong}; index the folder again")
