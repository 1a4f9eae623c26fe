"""Two-dimensional point sets: the smallest data on which a generative model can be seen to be wrong.

Each set is a mixture of shapes (shapes.py), so its density is known, and so is which part a point is of:
its class. Points are float32 (n, 2) of about unit scale, the same for the same seed and number.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from .members import npy_bytes
from .shapes import Blob, Curve, Ring, Segment, Shape, Square, polar
from .shards import ShardSet
from .sources import Source, make_shards

Part = tuple[Sequence[Shape], Sequence[float]]  # shapes, and how many of a number of points each gets


@dataclass(frozen=True)
class PointSet:
    """A mixture: by the name of a class its shapes and their weights, which need not sum to one."""

    parts: dict[str, Part]

    def __call__(self, n: int, seed: int) -> np.ndarray:
        """Return n points (n, 2)."""
        return self.labelled(n, seed)[0]

    def labelled(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return n points (n, 2) and the class of each, int64 (n,)."""
        random = np.random.default_rng(seed)
        choice = random.choice(len(self._shapes), n, p=self._weights)
        points = np.empty((n, 2), np.float32)
        for number in np.unique(choice):
            own = choice == number
            points[own] = self._shapes[number].draw(int(own.sum()), random)
        sizes = [len(shapes) for shapes, _ in self.parts.values()]
        return points, np.repeat(np.arange(len(sizes)), sizes)[choice]

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return log p (n,) in nats at points (n, 2), minus infinity where there are none."""
        each = np.stack([shape.log_density(points.astype(np.float64)) for shape in self._shapes])
        return logsumexp(each, axis=0, b=self._weights[:, None])

    @property
    def _shapes(self) -> list[Shape]:
        return [shape for shapes, _ in self.parts.values() for shape in shapes]

    @property
    def _weights(self) -> np.ndarray:
        weights = np.array([weight for _, weights in self.parts.values() for weight in weights])
        return weights / weights.sum()


def _each(shapes: dict[str, Shape]) -> PointSet:
    """Return the set of these shapes, each a class of its own, with equal weights."""
    return PointSet({name: ([shape], [1.0]) for name, shape in shapes.items()})


def _board() -> PointSet:
    """Return the 8 dark squares of a 4 x 4 board over [-2, 2] x [-2, 2]; dark where column + row is even."""
    places = [(column, row) for column in range(4) for row in range(4) if (column + row) % 2 == 0]
    return _each({f"{column} {row}": Square((column - 2, row - 2), 1.0) for column, row in places})


def _rings() -> PointSet:
    """Return 4 circles around the origin."""
    return _each({f"radius {radius}": Ring(radius, 0.05) for radius in (0.5, 1.0, 1.5, 2.0)})


def _olympic() -> PointSet:
    """Return 5 rings that interlock."""
    colours = {
        "blue": (-2.2, 0.4),
        "black": (0, 0.4),
        "red": (2.2, 0.4),
        "yellow": (-1.1, -0.6),
        "green": (1.1, -0.6),
    }
    return _each({name: Ring(0.74, 0.04, (0.74 * x, 0.74 * y)) for name, (x, y) in colours.items()})


def _spirals() -> PointSet:
    """Return two arms that wind one and a half times around each other."""
    return _each({f"arm {arm}": Curve(partial(_arm, np.pi * arm), 0.05) for arm in range(2)})


def _arm(start: float, u: np.ndarray) -> np.ndarray:
    # The square root makes the density even along an arm whose length grows with the square of the angle.
    turn = np.sqrt(u)
    return polar(2 * turn, 3 * np.pi * turn + start)


def _moons() -> PointSet:
    """Return two half circles that reach into each other."""
    return _each({"upper": Curve(partial(_moon, 1), 0.1), "lower": Curve(partial(_moon, -1), 0.1)})


def _moon(side: int, u: np.ndarray) -> np.ndarray:
    return side * (polar(1.0, np.pi * u) - [0.5, 0.25])


def _gaussians() -> PointSet:
    """Return 8 Gaussians on a circle."""
    centres = polar(1.4, np.pi * np.arange(8) / 4)
    return _each({f"{place}": Blob((float(x), float(y)), 0.1) for place, (x, y) in enumerate(centres)})


def _tree(levels: int = 8) -> PointSet:
    """Return a tree whose every branch ends in two shorter ones; its points are even along the branches."""
    trunk = Segment((0.0, -3.0), (0.0, -1.8), 0.02)
    left, right = (_branches(trunk, side, levels - 1) for side in (1, -1))
    parts = {"trunk": [trunk], "left": left, "right": right}
    return PointSet(
        {name: (branches, [each.length for each in branches]) for name, branches in parts.items()}
    )


def _branches(below: Segment, side: int, levels: int) -> list[Segment]:
    """Return the branch to one side of the end of another, and all that grow from it."""
    along = complex(*np.subtract(below.end, below.start)) * 0.72 * np.exp(0.45j * side)
    tip = (below.end[0] + along.real, below.end[1] + along.imag)
    branch = Segment(below.end, tip, below.blur)
    return [branch] + [each for way in (1, -1) if levels > 1 for each in _branches(branch, way, levels - 1)]


def _carpet(levels: int = 3, side: float = 3.6) -> PointSet:
    """Return Sierpinski's carpet: of 3 x 3 squares the middle one is left out, again and again."""
    kept = [(column - 1, row - 1) for column in range(3) for row in range(3) if (column, row) != (1, 1)]
    parts: dict[str, Part] = {}
    for first in kept:
        shapes = []
        for others in itertools.product(kept, repeat=levels - 1):
            centre = sum(
                (np.array(place) / 3.0**level for level, place in enumerate((first, *others), 1)), np.zeros(2)
            )
            x, y = side * (centre - 0.5 / 3**levels)
            shapes.append(Square((float(x), float(y)), side / 3**levels))
        parts[f"{first[0]} {first[1]}"] = (shapes, [1.0] * len(shapes))
    return PointSet(parts)


SETS: dict[str, PointSet] = {
    "checkerboard": _board(),
    "rings": _rings(),
    "olympic": _olympic(),
    "spirals": _spirals(),
    "moons": _moons(),
    "gaussians": _gaussians(),
    "tree": _tree(),
    "carpet": _carpet(),
}


def on_dark_squares(uniform: np.ndarray) -> np.ndarray:
    """Take uniform numbers (n, 2) in [0, 1) to the dark squares of a 4 x 4 board over [-1, 1] x [-1, 1].

    A square is dark where column + row is even. Equal areas become equal areas, so the points are uniform.
    """
    column, row = 4 * uniform[:, 0], 4 * uniform[:, 1]
    # Of two rows, each half as high as it was, every column has the one of its own parity.
    pair, within = np.divmod(row, 2)
    row = 2 * pair + np.floor(column) % 2 + within / 2
    return np.stack([column, row], axis=1) / 2 - 1


def write_points(out: Path | str, name: str, *, n: int, seed: int) -> ShardSet:
    """Write n points of a set, with their classes, as a data set of `points.npy` members and return it.

    Raises `ValueError` for a name that is no set, or an `out` that holds something else.
    """
    if name not in SETS:
        raise ValueError(f"{name!r} is no point set; expected one of {', '.join(SETS)}")
    if n < 1:
        raise ValueError(f"n is {n}; a data set has at least one point")
    source = Source(
        samples=partial(_samples, name, n, seed),
        num_samples=n,
        info={"name": name, "seed": seed, "dimensions": 2, "classes": list(SETS[name].parts)},
        licence="CC0-1.0",
        origin=f"drawn by driftmap.data.synthetic: {name}",
    )
    return make_shards(source, out)


def _samples(name: str, n: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (point, label) in enumerate(zip(*SETS[name].labelled(n, seed), strict=True)):
        yield f"{number:08d}", {"points.npy": npy_bytes(point), "cls": str(label).encode()}
