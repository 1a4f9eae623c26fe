"""Tables of numbers as points: columns standardised, by what `dataset.json` keeps, and gaps filled.

    stored = (value + step noise - mean) / std,   noise uniform on [-1/2, 1/2)

Mean and std are those of the rows that are trained on. So a density of the stored points, in nats, is one of
the values in their own units when log std of every column is subtracted: -log p(values) = -log p(stored) +
`log_scale`. Papers mostly give numbers of the stored points.

A column whose values repeat has no density; where they are multiples of a step, noise fills the gaps, once
for good: on average log(density x step) is at most the logarithm of the probability of the value (Theis,
van den Oord and Bethge, 2016). A column that is constant, or has a value that very many rows share, is
refused.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .making import Source
from .members import npy_bytes
from .number_files import Numbers, read_numbers
from .split import is_held_out

FEW_DISTINCT = 0.5  # of the rows: a column with fewer distinct values has some that repeat
SPIKE = 0.05  # of the rows that share a value: no density has that
KEY = "table"  # in the `info` of a data set


@dataclass(frozen=True)
class Standard:
    """What became of each column: (value + step noise - mean) / std."""

    columns: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    steps: np.ndarray  # 0: nothing was added

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Standard | None":
        """Return what a data set's `info` says, or None where it is no table."""
        if KEY not in info:
            return None
        table = info[KEY]
        arrays = (np.array(table[name], np.float64) for name in ("mean", "std", "steps"))
        return cls(tuple(table["columns"]), *arrays)

    @property
    def log_scale(self) -> float:
        """Nats to add to -log p(stored) for that of the values in their own units."""
        return float(np.log(self.std).sum())

    def info(self) -> dict[str, Any]:
        """Return what `dataset.json` keeps."""
        return {
            "columns": list(self.columns),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "steps": self.steps.tolist(),
            "log_scale": self.log_scale,
        }

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Return values (n, D), their gaps filled, as they are stored."""
        return ((values - self.mean) / self.std).astype(np.float32)

    def values(self, stored: np.ndarray) -> np.ndarray:
        """Return stored points (n, D) in the units of the table, on the grid of those that have a step."""
        found = stored.astype(np.float64) * self.std + self.mean
        whole = self.steps > 0
        found[:, whole] = np.round(found[:, whole] / self.steps[whole]) * self.steps[whole]
        return found


def tabular(
    path: Path | str,
    *,
    label: str | None = None,
    dropped: Sequence[str] = (),
    held_out: float | None = None,
) -> Source:
    """Return the rows of a file of numbers (number_files.py) as points of unit variance.

    `held_out` is the share that `split` will hold out: what remains says mean and std.

    Raises `ValueError` for what is no number, and for columns that have no density.
    """
    path = Path(path)
    found = read_numbers(path, label=label, dropped=dropped)
    listing = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    trained = np.array(
        [held_out is None or not is_held_out(_key(n), held_out) for n in range(len(found.values))]
    )
    return source_of(
        found, trained=trained, name=path.stem, origin=f"a table called {path.name}", listing=listing
    )


def source_of(
    found: Numbers,
    *,
    trained: np.ndarray,
    name: str,
    origin: str,
    listing: str,
    standard: Standard | None = None,
) -> Source:
    """Return rows as a source; those `trained` (n,) say mean and std, unless there is a `standard`."""
    values = found.values
    if standard is None:
        steps = np.array([_step(column, name, c) for column, c in zip(values.T, found.columns, strict=True)])
        values = values + steps * (np.random.default_rng(0).random(values.shape) - 0.5)
        known = values[trained]
        spread = known.std(0) if len(known) else np.zeros(values.shape[1])
        if not spread.all():
            column = found.columns[int(spread.argmin())]
            raise ValueError(
                f"{name}: the column {column!r} has one value in the {len(known)} rows to train on; leave it "
                f"out by --drop {column}, or hold out less"
            )
        standard = Standard(found.columns, known.mean(0), spread, steps)
    info: dict[str, Any] = {"name": name, "dimensions": len(found.columns), KEY: standard.info()}
    if found.labels is not None:
        info["classes"] = list(found.classes)
    return Source(
        samples=partial(_samples, standard.stored(values), found.labels),
        num_samples=len(values),
        info={**info, "listing": listing},
        origin=origin,
    )


def _samples(points: np.ndarray, labels: np.ndarray | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, point in enumerate(points):
        members = {"points.npy": npy_bytes(point)}
        if labels is not None:
            members["cls"] = str(labels[number]).encode()
        yield _key(number), members


def _key(number: int) -> str:
    return f"{number:08d}"


def _step(values: np.ndarray, name: str, column: str) -> float:
    """Return the step that the values of a column are multiples of, 0 where they are continuous.

    Raises `ValueError` where the column has no density.
    """
    distinct, counts = np.unique(values, return_counts=True)
    remedy = f"leave it out by --drop {column}"
    if len(distinct) == 1:
        raise ValueError(f"{name}: the column {column!r} is {distinct[0]:g} in every row; {remedy}")
    step = np.diff(distinct).min()
    places = distinct / step
    even = np.abs(places - np.round(places)).max() < 1e-3
    if len(distinct) < FEW_DISTINCT * len(values) and even:
        return float(step)
    if len(distinct) < FEW_DISTINCT * len(values) or counts.max() > max(1, SPIKE * len(values)):
        raise ValueError(
            f"{name}: the column {column!r} is {distinct[counts.argmax()]:g} in {counts.max()} of "
            f"{len(values)} rows and its values are no multiples of a step, so they have no density; {remedy}"
        )
    return 0.0
