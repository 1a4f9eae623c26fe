"""Shapes in the plane of which points are drawn, each with its density: what point sets are made of.

A line is blurred by a Gaussian of spread `blur` on both axes; its density is that of the line convolved with
it. All are exact but a `Curve`'s, which is a sum over a fine grid of the curve.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import i0e, log_ndtr, logsumexp

Place = tuple[float, float]
_EDGE = 1e-6  # an area's points may be rounded across its edge
_NODES = 2048  # of a curve
_AT_ONCE = 1024  # points that are compared with all nodes


class Shape(Protocol):
    """A distribution of points in the plane."""

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        ...

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return log p (n,) in nats at points (n, 2)."""
        ...


@dataclass(frozen=True)
class Square:
    """Points anywhere in a square, by its lower left corner."""

    corner: Place
    side: float

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        return self.corner + self.side * random.random((n, 2))

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return -log(side^2) inside, else minus infinity."""
        off_centre = np.abs(points - self.corner - self.side / 2).max(axis=1)
        return np.where(off_centre <= self.side / 2 + _EDGE, -2 * np.log(self.side), -np.inf)


@dataclass(frozen=True)
class Blob:
    """A Gaussian of one spread."""

    centre: Place
    spread: float

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        return self.centre + self.spread * random.standard_normal((n, 2))

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return log N(x; centre, spread^2 I)."""
        return _log_gaussian(np.square(points - self.centre).sum(axis=1), self.spread)


@dataclass(frozen=True)
class Ring:
    """A blurred circle."""

    radius: float
    blur: float
    centre: Place = (0.0, 0.0)

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        return self.centre + blurred(polar(self.radius, random.uniform(0, 2 * np.pi, n)), self.blur, random)

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return log of N((r - R) / blur) I0(z) exp(-z) / blur^2 up to constants, z = r R / blur^2.

        The mean over the circle of exp(z cos(angle)) is the modified Bessel function I0(z).
        """
        r = np.linalg.norm(points - self.centre, axis=1)
        bessel = np.log(i0e(r * self.radius / self.blur**2))
        return _log_gaussian(np.square(r - self.radius), self.blur) + bessel


@dataclass(frozen=True)
class Segment:
    """A blurred straight line between two points."""

    start: Place
    end: Place
    blur: float

    @property
    def length(self) -> float:
        """The distance of its ends."""
        return float(np.linalg.norm(np.subtract(self.end, self.start)))

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        line = self.start + random.random((n, 1)) * np.subtract(self.end, self.start)
        return blurred(line, self.blur, random)

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return log N(distance / blur) (Phi(to one end / blur) - Phi(to the other / blur)) / length."""
        along = np.subtract(self.end, self.start) / self.length
        offset = points - np.add(self.start, self.end) / 2
        side = offset @ np.array([-along[1], along[0]])
        # In the lower tail, where a difference of distribution functions does not round to zero.
        place = np.abs(offset @ along)
        far, near = (log_ndtr((half - place) / self.blur) for half in (self.length / 2, -self.length / 2))
        across = -np.square(side / self.blur) / 2 - np.log(np.sqrt(2 * np.pi) * self.blur)
        return across + far + np.log(-np.expm1(near - far)) - np.log(self.length)


@dataclass(frozen=True)
class Curve:
    """A blurred curve: `along` takes uniform numbers (n,) to its points (n, 2)."""

    along: Callable[[np.ndarray], np.ndarray]
    blur: float

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return n points (n, 2)."""
        return blurred(self.along(random.random(n)), self.blur, random)

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """Return the logarithm of the mean over the curve's nodes u of N(x; along(u), blur^2 I)."""
        nodes = self.along((np.arange(_NODES) + 0.5) / _NODES)
        parts = np.split(points, range(_AT_ONCE, len(points), _AT_ONCE))
        squares = (np.square(part[:, None] - nodes).sum(axis=2) for part in parts)
        return np.concatenate(
            [logsumexp(_log_gaussian(each, self.blur), axis=1) for each in squares]
        ) - np.log(_NODES)


def polar(radius: float | np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the points (n, 2) at these distances and angles (n,) from the origin."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def blurred(points: np.ndarray, width: float, random: np.random.Generator) -> np.ndarray:
    """Return points (n, 2) with Gaussian noise."""
    return points + width * random.standard_normal(points.shape)


def _log_gaussian(square: np.ndarray, spread: float) -> np.ndarray:
    """Return log N(x; 0, spread^2 I) in the plane, of the squares |x|^2."""
    return -square / (2 * spread**2) - np.log(2 * np.pi * spread**2)
