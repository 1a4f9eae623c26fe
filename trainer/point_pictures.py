"""Pictures of points and densities of the plane as PNGs in data URIs; the same points give the same bytes."""

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

SIDE = 240  # pixels
DOT = 2  # pixels a side of a point
# Seen on a light and on a dark page; the first five are the colours of the Olympic rings, black as grey.
CLASSES = ("#1f77d0", "#7c8590", "#d63c3c", "#dba507", "#1b9e5a", "#8a4aa3", "#e0752a", "#18a0ab")
PLAIN = "#1f77d0"


def class_colours(labels: Tensor | None, count: int) -> np.ndarray:
    """Return the colours (N, 3) uint8 of points with these classes (N,), one for all without."""
    table = np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in (*CLASSES, PLAIN)], np.uint8)
    if labels is None:
        return np.repeat(table[-1:], count, axis=0)
    return table[labels.numpy()[:count] % len(CLASSES)]


def scatter(points: Tensor, colours: np.ndarray, *, reach: float) -> str:
    """Draw points (N, 2) in [-reach, reach]^2 on a transparent ground; those outside are left out."""
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    places = ((points.numpy().astype(np.float64) / reach + 1) / 2 * SIDE).round()
    inside = np.isfinite(places).all(1) & (places >= 0).all(1) & (places <= SIDE - DOT).all(1)
    x, y = places[inside].astype(int).T
    for right in range(DOT):
        for down in range(DOT):
            rows = SIDE - DOT - y + down
            canvas[rows, x + right, :3] = colours[inside]
            canvas[rows, x + right, 3] = 235
    return _uri(Image.fromarray(canvas))


def heat(density: Tensor, *, most: float) -> str:
    """Draw a density (H, W), rows from the top, from 0 to `most`."""
    shares = np.clip(density.numpy() / most, 0, 1) ** 0.6  # so that faint mass in the wrong place is seen
    colours = (matplotlib.colormaps["magma"](shares)[..., :3] * 255).round().astype(np.uint8)
    return _uri(Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
