"""The five tables that density estimators are compared on, from the files that a user has of them.

    density:NAME:PART:FOLDER, PART train, validation or test, and in FOLDER

    power       data.npy                            6 columns remain
    gas         ethylene_CO.csv                     8
    hepmass     1000_train.csv and 1000_test.csv   21
    miniboone   data.npy                           43
    bsds300     BSDS300.hdf5                       63

What is done to the rows follows the published preparation (Papamakarios, Pavlakou and Murray, "Masked
autoregressive flow for density estimation", 2017, appendix D): which columns go, noise on those of power that
are rounded, and a tenth held out twice. It was written down without the files at hand, and run on files of
their form only; a number of columns other than the published one is refused. Mean and std are those of train
and validation together, of gas those of all rows; patches of bsds300 stay as they are.

gas was published as a pickle, which can run code when it is read; convert it once, where it may be trusted:
pandas.read_pickle("ethylene_CO.pickle").to_csv("ethylene_CO.csv", index=False).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .making import Source
from .number_files import Numbers, read_numbers
from .tabular import Standard, source_of

PARTS = ("train", "validation", "test")
MOST_ALIKE = 0.98  # a correlation beyond which one of two columns of gas goes
MOST_REPEATED = 5  # times that the smallest value of a column of hepmass may come


@dataclass(frozen=True)
class Parts:
    """The rows (n, D) of each part, and what they are standardised by (None: nothing)."""

    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    known: np.ndarray | None


def density_set(text: str) -> Source:
    """Return a part of a set, `text` being NAME:PART:FOLDER.

    Raises `ValueError` for no such name, part or file, and where the files are not the published ones.
    """
    name, _, rest = text.partition(":")
    part, _, folder = rest.partition(":")
    if name not in SETS or part not in PARTS or not folder:
        raise ValueError(
            f"density:{text}: expected density:NAME:PART:FOLDER, NAME one of {', '.join(SETS)}, PART one of "
            f"{', '.join(PARTS)}"
        )
    files, num_columns, read = SETS[name]
    places = [Path(folder) / file for file in files]
    if missing := [str(place) for place in places if not place.is_file()]:
        raise ValueError(f"{missing[0]} is not there; {name} is read from {' and '.join(files)}")
    parts = read(*places)
    rows = parts.rows[PARTS.index(part)]
    if rows.shape[1] != num_columns:
        raise ValueError(
            f"{name} has {rows.shape[1]} columns here, but {num_columns} as it was published; the files in "
            f"{folder} are others"
        )
    columns = tuple(f"x{place}" for place in range(num_columns))
    mean, std = np.zeros(num_columns), np.ones(num_columns)
    if parts.known is not None:
        mean, std = parts.known.mean(0), parts.known.std(0)
    digest = hashlib.sha256()
    for block in (block for place in places for block in _blocks(place)):
        digest.update(block)
    return source_of(
        Numbers(columns, rows),
        trained=np.ones(len(rows), bool),
        name=f"{name} {part}",
        origin=f"the {part} part of {name}, prepared as for masked autoregressive flows",
        listing=digest.hexdigest()[:16],
        standard=Standard(columns, mean, std, np.zeros(num_columns)),
    )


def _blocks(place: Path) -> Iterator[bytes]:
    with open(place, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def _power(file: Path) -> Parts:
    rows = read_numbers(file).values
    random = np.random.RandomState(42)  # the generator of the published preparation
    random.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    voltage, gap = 0.01 * random.rand(len(rows), 1), 0.001 * random.rand(len(rows), 1)
    metering = random.rand(len(rows), 3)
    return _in_tenths(rows + np.hstack([gap, voltage, metering, np.zeros((len(rows), 1))]))


def _gas(file: Path) -> Parts:
    rows = read_numbers(file, dropped=("Meth", "Ethylene", "Time")).values
    while (alike := (np.corrcoef(rows, rowvar=False) > MOST_ALIKE).sum(1) > 1).any():
        rows = np.delete(rows, int(alike.argmax()), axis=1)
    return Parts(_in_tenths(rows).rows, known=rows)


def _hepmass(train: Path, test: Path) -> Parts:
    signal, held_out = (_signal(file) for file in (train, test))
    kept = [(column == column.min()).sum() <= MOST_REPEATED for column in signal.T]
    signal, held_out = signal[:, kept], held_out[:, : len(kept)][:, kept]
    last = int(0.1 * len(signal))
    return Parts((signal[:-last], signal[-last:], held_out), known=signal)


def _signal(file: Path) -> np.ndarray:
    """Return the rows of class 1, whose first column the class is."""
    rows = read_numbers(file).values
    return rows[rows[:, 0] == 1, 1:]


def _miniboone(file: Path) -> Parts:
    return _in_tenths(read_numbers(file).values)


def _bsds300(file: Path) -> Parts:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{file} needs h5py: install driftmap[tabular]") from error
    with h5py.File(file) as stored:
        train, validation, test = (np.asarray(stored[part], np.float64) for part in PARTS)
    return Parts((train, validation, test), known=None)


def _in_tenths(rows: np.ndarray) -> Parts:
    """Return rows whose last tenth is the test, and the last tenth of the others the validation."""
    test = int(0.1 * len(rows))
    validation = int(0.1 * (len(rows) - test))
    known = rows[: len(rows) - test]
    split = len(known) - validation
    return Parts((known[:split], known[split:], rows[len(rows) - test :]), known=known)


SETS: dict[str, tuple[tuple[str, ...], int, Callable[..., Parts]]] = {
    "power": (("data.npy",), 6, _power),
    "gas": (("ethylene_CO.csv",), 8, _gas),
    "hepmass": (("1000_train.csv", "1000_test.csv"), 21, _hepmass),
    "miniboone": (("data.npy",), 43, _miniboone),
    "bsds300": (("BSDS300.hdf5",), 63, _bsds300),
}
