"""Tables as rows: CSV, TSV, JSON lines and parquet files, and data sets of the `datasets` library.

A `Table` can be read again, some columns at a time, in the order of its rows and without holding them all.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

_TAIL_BYTES = 1 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows that can be read again, some columns at a time."""

    name: str
    folder: Path
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    listing: str  # tells a table that has changed since from the same one
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def place(self, number: int) -> str:
        """Return what an error calls a row; people count from 1."""
        return f"{self.name}: row {number + 1}"


def open_file(path: Path) -> Table:
    """Open a table by its suffix.

    Raises `ValueError` for a file that cannot be read as what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".csv", ".tsv"):
        rows = partial(_csv_rows, path, "\t" if suffix == ".tsv" else ",")
        names = next(rows((), header=True))
    else:
        rows = partial(_json_rows, path)
        names = dict.fromkeys(name for row in rows(()) for name in row)
    return Table(str(path), path.parent, tuple(names), rows, _digest(path))


def _csv_rows(path: Path, delimiter: str, _: Sequence[str], *, header: bool = False) -> Iterator[Row]:
    """Yield the rows as dictionaries, or the header alone."""
    number = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(lines, [])
            if header:
                yield dict.fromkeys(names)
                return
            for line in lines:
                if not line:
                    continue
                if len(line) != len(names):
                    raise ValueError(f"it has {len(line)} fields but the header has {len(names)}")
                yield dict(zip(names, line, strict=True))
                number += 1
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: row {number}: {error}; expected CSV in UTF-8") from error


def _json_rows(path: Path, _: Sequence[str]) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate((line for line in file if line.strip()), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}: row {number}: no JSON ({error}); expected an object a line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number}: {line[:40]!r} is no object; expected one a line")
            yield row


def _parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: install driftmap[parquet]") from error
    try:
        names = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file ({error}); write or copy it again") from error

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        # Without columns arrow gives no rows to count, so the first one stands for them.
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(256, columns=list(columns) or names[:1]):
                yield from batch.to_pylist()

    return Table(str(path), path.parent, tuple(names), rows, _digest(path, tail=True))


def open_datasets(name: str, found: Any) -> Table:
    """Return the rows of a loaded data set; pictures stay the bytes that they are."""
    library = import_datasets()
    names = {key: kind.names for key, kind in found.features.items() if isinstance(kind, library.ClassLabel)}
    for key, kind in found.features.items():
        if isinstance(kind, library.Image):
            found = found.cast_column(key, library.Image(decode=False))

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        yield from found.select_columns(list(columns)) if columns else ({} for _ in range(len(found)))

    return Table(name, Path(), tuple(found.features), rows, found._fingerprint, names)


def import_datasets() -> Any:
    """Import the optional library."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this source needs the library datasets: install driftmap[datasets]") from error
    return datasets


def _digest(path: Path, *, tail: bool = False) -> str:
    """Return a digest of a file; the end of a parquet file describes all of it, and the file may be large."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES) if tail else 0)
        while block := file.read(_TAIL_BYTES):
            digest.update(block)
    return digest.hexdigest()[:16]
