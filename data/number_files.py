"""Files of numbers, a sample a row: .csv .tsv .jsonl .parquet, .npy, .npz and .rda of R.

A table has at most one column that is no number, its class. An .npy or .npz holds one array (n, D), an .npz
perhaps `labels` (n,) besides; an .rda holds one data frame.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .members import NO_ARRAY
from .rows import SUFFIXES, open_file

KINDS = (*SUFFIXES, ".npy", ".npz", ".rda")


@dataclass(frozen=True)
class Numbers:
    """Rows of numbers (n, D), float64, with the names of their columns and maybe a class a row."""

    columns: tuple[str, ...]
    values: np.ndarray
    labels: np.ndarray | None = None  # (n,), int64
    classes: tuple[str, ...] = ()

    def without(self, dropped: Sequence[str], name: str) -> "Numbers":
        """Return all but some columns."""
        for column in dropped:
            if column not in self.columns:
                raise ValueError(
                    f"{name} has the columns {', '.join(self.columns)} and no {column!r}; drop one of them"
                )
        kept = [place for place, column in enumerate(self.columns) if column not in dropped]
        names = tuple(self.columns[place] for place in kept)
        return Numbers(names, self.values[:, kept], self.labels, self.classes)


def read_numbers(path: Path, *, label: str | None = None, dropped: Sequence[str] = ()) -> Numbers:
    """Read a file of numbers.

    The class is the column `label`; None takes the one that holds texts, "" leaves texts out.

    Raises `ValueError` naming the row and column of what is no number.
    """
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in KINDS:
        raise ValueError(f"{path} is no file of numbers; expected one of {', '.join(KINDS)}")
    if suffix in (".npy", ".npz"):
        found = _arrays(path)
        if label:
            raise ValueError(f"--class {label}: {path} has no names; classes are its array `labels`")
        found = found.without(dropped, str(path))
    else:
        columns = _frame(path) if suffix == ".rda" else _table(path)
        found = _of_columns(path, columns, label, dropped)
    _check(found, path)
    return found


def _table(path: Path) -> dict[str, np.ndarray]:
    table = open_file(path)
    rows = [list(row.get(name) for name in table.columns) for row in table.rows(table.columns)]
    return {name: np.array([row[n] for row in rows], object) for n, name in enumerate(table.columns)}


def _frame(path: Path) -> dict[str, np.ndarray]:
    try:
        import rdata
    except ImportError as error:
        raise ValueError(f"{path} needs rdata: install driftmap[tabular]") from error
    frames = rdata.read_rda(path, default_encoding="utf-8")
    if len(frames) != 1:
        raise ValueError(f"{path} holds {', '.join(frames) or 'nothing'}; expected one data frame")
    (frame,) = frames.values()
    return {str(name): np.asarray(frame[name], object) for name in frame.columns}


def _arrays(path: Path) -> Numbers:
    try:
        loaded: Any = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        arrays = {"values": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except NO_ARRAY as error:
        raise ValueError(f"{path} holds no array of numbers ({error}); write it by numpy.save") from error
    labels = arrays.pop("labels", None)
    fits = len(arrays) == 1 and all(each.ndim == 2 and each.dtype.kind in "fiu" for each in arrays.values())
    if not fits or (labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu")):
        shapes = ", ".join(f"{name} {each.dtype} {each.shape}" for name, each in arrays.items())
        raise ValueError(f"{path} holds {shapes}; expected one array (n, D), and whole numbers `labels` (n,)")
    (values,) = arrays.values()
    names = tuple(f"x{place}" for place in range(values.shape[1]))
    if labels is None:
        return Numbers(names, values.astype(np.float64))
    if len(labels) != len(values) or labels.min(initial=0) < 0:
        raise ValueError(
            f"{path}: labels {labels.shape} of {len(values)} rows; expected one a row, from 0 on"
        )
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    return Numbers(names, values.astype(np.float64), labels.astype(np.int64), classes)


def _of_columns(
    path: Path, columns: dict[str, np.ndarray], label: str | None, dropped: Sequence[str]
) -> Numbers:
    for name in [*dropped, *([label] if label else [])]:
        if name not in columns:
            raise ValueError(f"{path} has the columns {', '.join(columns)} and no {name!r}; name one of them")
    numbers: dict[str, np.ndarray] = {}
    texts: dict[str, str] = {}
    for name, values in columns.items():
        if name in dropped or name == label:
            continue
        try:
            numbers[name] = values.astype(np.float64)
        except (TypeError, ValueError):
            texts[name] = _first_text(values)
    if label is None and len(texts) == 1:
        (label,) = texts
    elif texts and label != "":
        name, said = next(iter(texts.items()))
        raise ValueError(
            f"{path}: the column {name!r} holds no number in {said}; leave it out by --drop {name}, or make "
            f"it the class by --class {name}"
        )
    stacked = np.stack(list(numbers.values()), axis=1) if numbers else np.empty((0, 0))
    if not label:
        return Numbers(tuple(numbers), stacked)
    classes, labels = np.unique(columns[label].astype(str), return_inverse=True)
    return Numbers(tuple(numbers), stacked, labels.astype(np.int64), tuple(classes.tolist()))


def _first_text(values: np.ndarray) -> str:
    """Return where the first value that is no number stands; people count rows from 1."""
    for row, value in enumerate(values, start=1):
        try:
            float(value)
        except (TypeError, ValueError):
            return f"row {row} ({value!r})"
    raise AssertionError("all are numbers")


def _check(found: Numbers, path: Path) -> None:
    if len(found.values) < 2 or not found.columns:
        raise ValueError(f"{path} holds {found.values.shape} numbers; expected two rows and a column or more")
    bad = np.argwhere(~np.isfinite(found.values))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{path}: row {row + 1} has {found.values[row, column]} in the column "
            f"{found.columns[column]!r}, and {len(bad) - 1} others are not finite either; leave these "
            "rows or columns out (--drop)"
        )
