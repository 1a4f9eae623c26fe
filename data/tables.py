"""Tables with one picture a row: CSV, JSON lines, parquet, and data sets of the `datasets` library.

A row names its picture by a path (relative to the table), or holds its bytes, as parquet and `datasets` do:
a binary column, or a pair of "bytes" and "path". JSON lines may hold them as a `data:...;base64,` address.

The order is that of the rows and the key is the number of the row, from 0. Class names become numbers in
the order of the alphabet; classes that are whole numbers already keep them, and the names that a
`ClassLabel` of `datasets` gives stay with theirs.
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .making import Source
from .pictures import Draft, PicturePolicy, finish
from .rows import SUFFIXES, Row, Table, import_datasets, open_datasets, open_file

__all__ = ["SUFFIXES", "Columns", "hub", "is_saved", "saved", "table"]

_DEFAULTS = {
    "picture": ("picture", "image", "img", "file_name", "filename", "path", "file", "image_path"),
    "class": ("class", "label", "category", "cls", "fine_label"),
    "caption": ("caption", "text", "description", "prompt"),
}
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Columns:
    """The columns of a table; None finds one by its usual names, and "" takes none."""

    picture: str | None = None
    label: str | None = None
    caption: str | None = None


def table(path: Path | str, *, policy: PicturePolicy, columns: Columns | None = None) -> Source:
    """Return the rows of a CSV, TSV, JSON lines or parquet file.

    Raises `ValueError` for a file or column that is missing, and for a row that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a table ({', '.join(SUFFIXES)})")
    return _source(open_file(path), policy, columns or Columns(), path.stem, f"a table called {path.name}")


def is_saved(path: Path) -> bool:
    """Tell whether `datasets` saved a data set, or several splits, in a folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def saved(path: Path | str, *, policy: PicturePolicy, columns: Columns | None = None) -> Source:
    """Return a data set that was saved by `save_to_disk` of the `datasets` library.

    Raises `ValueError` for several splits, naming the folder of each.
    """
    path = Path(path)
    try:
        found = import_datasets().load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened by `datasets` ({error}); save it again") from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise ValueError(
                f"{path} holds several splits; expected one: {', '.join(f'{path / s}' for s in found)}"
            )
        (found,) = found.values()
    name = path.resolve().name
    return _source(
        open_datasets(str(path), found),
        policy,
        columns or Columns(),
        name,
        f"a saved data set called {name}",
    )


def hub(name: str, *, policy: PicturePolicy, columns: Columns | None = None) -> Source:
    """Return a split of a data set that `datasets` finds by name, `NAME` (its train split) or `NAME:SPLIT`.

    Raises `ValueError` if it is neither on this machine nor to be had, saying how to bring it here.
    """
    repository, _, split = name.partition(":")
    library = import_datasets()
    try:
        found = library.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hf:{name} cannot be loaded ({error}). Where there is no network, save it elsewhere by "
            f"datasets.load_dataset({repository!r}).save_to_disk(FOLDER), and give the FOLDER instead"
        ) from error
    rows = open_datasets(f"hf:{name}", found)
    source = _source(rows, policy, columns or Columns(), repository, f"hf:{name}")
    return replace(source, licence=found.info.license or "")


def _source(found: Table, policy: PicturePolicy, columns: Columns, name: str, origin: str) -> Source:
    picture = _column(found, "picture", columns.picture)
    if picture is None:
        raise ValueError(
            f"{found.name} has the columns {', '.join(found.columns)}; expected one with the pictures: "
            "name it by --picture"
        )
    label = _column(found, "class", columns.label)
    caption = _column(found, "caption", columns.caption)
    num_samples, classes = _scan(found, label)
    if not num_samples:
        raise ValueError(f"{found.name} has no rows; expected one picture a row")
    return Source(
        samples=partial(_samples, found, picture, label, caption, {c: n for n, c in enumerate(classes)}),
        num_samples=num_samples,
        info={"name": name, **policy.info, "classes": classes, "listing": found.listing},
        origin=origin,
        finish=partial(finish, policy),
        buckets=policy.buckets,
    )


def _column(found: Table, kind: str, chosen: str | None) -> str | None:
    if chosen == "":
        return None
    if chosen is not None and chosen not in found.columns:
        raise ValueError(
            f"{found.name} has the columns {', '.join(found.columns)} and none called {chosen!r}; "
            f"name one of them by --{kind}"
        )
    return chosen or next((name for name in _DEFAULTS[kind] if name in found.columns), None)


def _scan(found: Table, label: str | None) -> tuple[int, list[str]]:
    """Count the rows and return the names of the classes, numbers in the order of their value."""
    values: set[str] = set()
    num_rows = 0
    for num_rows, row in enumerate(found.rows((label,) if label else ()), start=1):
        if label is not None:
            values.add(_class(found, num_rows - 1, label, row))
    if label is None:
        return num_rows, []
    if label in found.class_names:
        return num_rows, found.class_names[label]
    if not all(value.isascii() and value.isdigit() and str(int(value)) == value for value in values):
        return num_rows, sorted(values)
    highest = max(map(int, values), default=-1)
    if highest >= _MOST_CLASSES:
        raise ValueError(
            f"{found.name}: {label} has the number {highest}; expected classes counted from 0, or names"
        )
    return num_rows, [str(value) for value in range(highest + 1)]


def _class(found: Table, number: int, label: str, row: Row) -> str:
    value = row.get(label)
    names = found.class_names.get(label)
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if names is None and isinstance(value, int | str) and value != "":
        return str(int(value) if isinstance(value, bool) else value).strip()
    expected = f"a number below {len(names)}" if names else "a name or a whole number"
    raise ValueError(
        f"{found.place(number)}: {label} is {value!r}; expected {expected}, or --class '' for none"
    )


def _samples(
    found: Table, picture: str, label: str | None, caption: str | None, classes: dict[str, int]
) -> Iterator[tuple[str, Draft]]:
    for number, row in enumerate(found.rows([name for name in (picture, label, caption) if name])):
        about: Row = {}
        text = row.get(caption) if caption else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{found.place(number)}: {caption} is {text!r}; expected a text")
        if text and text.strip():
            about["caption"] = text.strip()
        if label is not None:
            about["class"] = classes[_class(found, number, label, row)]
        place = found.place(number)
        try:
            content = _picture(found.folder, row.get(picture))
        except ValueError as error:
            raise ValueError(
                f"{place}: {picture} {error}; expected a path or the bytes of a picture"
            ) from error
        yield (
            f"{number:08d}",
            Draft(content, f"{place} ({content})" if isinstance(content, Path) else place, about),
        )


def _picture(folder: Path, value: Any) -> Path | bytes:
    if isinstance(value, dict):  # the two fields of an image in `datasets`
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        try:
            value = base64.b64decode(value.partition(";base64,")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"is no data:...;base64, address ({error})") from error
    if isinstance(value, str) and value.strip():
        return folder / value.strip()
    if isinstance(value, bytes) and value:
        return value
    raise ValueError("is empty" if not value else f"is {type(value).__name__} {str(value)[:40]!r}")
