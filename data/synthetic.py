"""Two-dimensional point sets: the smallest data on which a generative model can be seen to be wrong.

Each function returns float32 points (n, 2) of about unit scale, and the same points for the same seed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .members import npy_bytes
from .shards import ShardSet
from .sources import Source, make_shards


def checkerboard(n: int, seed: int) -> np.ndarray:
    """Draw from the 8 dark squares of a 4 x 4 board over [-2, 2] x [-2, 2], uniformly."""
    return 2 * on_dark_squares(np.random.default_rng(seed).random((n, 2), dtype=np.float32))


def on_dark_squares(uniform: np.ndarray) -> np.ndarray:
    """Take uniform numbers (n, 2) in [0, 1) to the dark squares of a 4 x 4 board over [-1, 1] x [-1, 1].

    A square is dark where column + row is even. Equal areas become equal areas, so the points are uniform.
    """
    column, row = 4 * uniform[:, 0], 4 * uniform[:, 1]
    # Of two rows, each half as high as it was, every column has the one of its own parity.
    pair, within = np.divmod(row, 2)
    row = 2 * pair + np.floor(column) % 2 + within / 2
    return np.stack([column, row], axis=1) / 2 - 1


def rings(n: int, seed: int) -> np.ndarray:
    """Draw from 4 circles around the origin with radii 0.5, 1, 1.5 and 2, blurred by 0.05."""
    random = np.random.default_rng(seed)
    radius = 0.5 * random.integers(1, 5, n)
    angle = random.uniform(0, 2 * np.pi, n)
    return _blurred(_polar(radius, angle), 0.05, random)


def spirals(n: int, seed: int) -> np.ndarray:
    """Draw from two arms that wind one and a half times around each other, blurred by 0.05."""
    random = np.random.default_rng(seed)
    # The square root makes the density even along an arm whose length grows with the square of the angle.
    turn = np.sqrt(random.random(n))
    arm = random.integers(0, 2, n)
    return _blurred(_polar(2 * turn, 3 * np.pi * turn + np.pi * arm), 0.05, random)


def moons(n: int, seed: int) -> np.ndarray:
    """Draw from two half circles that reach into each other, blurred by 0.1."""
    random = np.random.default_rng(seed)
    upper = random.integers(0, 2, n)
    half = _polar(np.ones(n), random.uniform(0, np.pi, n))
    half = np.where(upper[:, None] == 1, half - [0.5, 0.25], [0.5, 0.25] - half)
    return _blurred(half, 0.1, random)


SETS: dict[str, Callable[[int, int], np.ndarray]] = {
    "checkerboard": checkerboard,
    "rings": rings,
    "spirals": spirals,
    "moons": moons,
}


def write_points(out: Path | str, name: str, *, n: int, seed: int) -> ShardSet:
    """Write n points of a set as a data set of `points.npy` members and return it.

    Raises `ValueError` for a name that is no set, or an `out` that holds something else.
    """
    if name not in SETS:
        raise ValueError(f"{name!r} is no point set; expected one of {', '.join(SETS)}")
    if n < 1:
        raise ValueError(f"n is {n}; a data set has at least one point")
    source = Source(
        samples=partial(_samples, name, n, seed),
        num_samples=n,
        info={"name": name, "seed": seed, "dimensions": 2},
        licence="CC0-1.0",
        origin=f"drawn by driftmap.data.synthetic.{name}",
    )
    return make_shards(source, out)


def _samples(name: str, n: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, point in enumerate(SETS[name](n, seed)):
        yield f"{number:08d}", {"points.npy": npy_bytes(point)}


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _blurred(points: np.ndarray, width: float, random: np.random.Generator) -> np.ndarray:
    return (points + width * random.standard_normal(points.shape)).astype(np.float32)
