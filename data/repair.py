"""Writes anew what follows from the tars of a data set: their indices and the card. No tar is touched."""

import os
from collections.abc import Callable
from pathlib import Path

from .card import CARD, salvaged, write_dataset_card
from .check import ENCODED, fits
from .encode import NOTE
from .index import build_index, index_path, is_sidecar, list_tars, load_index, scan

_DAMAGED = f"{CARD}.damaged"


def repair_shards(folder: Path | str, *, progress: Callable[[int], None] | None = None) -> list[str]:
    """Write indices that are missing, damaged or of another tar, then the card; return what was done.

    What cannot be repaired is left as it is, for `check_shards` to name. `progress` is called with the tars
    done.
    """
    folder = Path(folder)
    done: list[str] = []
    whole = True
    for number, tar in enumerate(list_tars(folder), start=1):
        try:
            reason = _stale(tar)
            if reason:
                build_index(tar)
                done.append(f"{index_path(tar).name}: written, as it {reason}")
        except ValueError:
            whole = False
        if progress is not None:
            progress(number)
    if whole and not (folder / NOTE).is_file():
        done += _repair_card(folder)
    return done


def _stale(tar: Path) -> str:
    """Return what is wrong with the index of a tar; nothing where it is right.

    Raises `ValueError` for a tar that cannot be indexed, or another program's file in the index's place.
    """
    path = index_path(tar)
    if path.is_file() and not is_sidecar(path):
        raise ValueError(f"{path} was written by another program")
    scanned = scan(tar)
    if not path.is_file():
        return "was missing"
    try:
        index = load_index(tar)
    except ValueError:
        return "was damaged, of another version or of another tar"
    return "" if fits(index, scanned) else "was of another tar"


def _repair_card(folder: Path) -> list[str]:
    """Write the card of a folder whose tars are indexed, unless it is right or cannot be made of them."""
    card = folder / CARD
    told = salvaged(card)
    before = card.read_bytes() if card.is_file() else None
    if told is not None:
        write_dataset_card(folder, **told)
        if card.read_bytes() == before:
            return []
        return [
            f"{CARD}: written, as it was wrong about its shards; what it says of classes and origin is kept"
        ]
    if any(ENCODED & set(load_index(tar).extensions) for tar in list_tars(folder)):
        return []
    if before is not None:
        os.replace(card, folder / _DAMAGED)
    write_dataset_card(folder, {})
    moved = f"; what was there is {_DAMAGED} now" if before is not None else ""
    return [f"{CARD}: written; names of classes, licence and origin are not known any more{moved}"]
