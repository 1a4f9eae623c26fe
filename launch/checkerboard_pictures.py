"""What flow maps of the checkerboard look like: their samples, the map, and KL against points seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .checkerboard_measure import title

# Even quantiles of both axes: equal shares of the noise, so that a picture of where it lands shows density.
_SIDE = 96
_QUANTILES = torch.special.ndtri((torch.arange(_SIDE) + 0.5) / _SIDE)
GRID = torch.cartesian_prod(_QUANTILES, _QUANTILES)

_BINS, _REACH = 128, 1.25

ByRule = Mapping[str, Mapping[str, Tensor]]  # points (N, 2) by rule and title


def draw_samples(found: ByRule, folder: Path) -> None:
    """Draw the density of samples in samples.png: a row a rule, a column a number of steps.

    One scale for all, from none to three times the density of the data, which is 1 / 2 on the dark squares.
    """
    figure, axes = _panels(found)
    for line, at in zip(axes, found.values(), strict=True):
        for place, points in zip(line, at.values(), strict=True):
            most = 3 / 2 * len(points) * (2 * _REACH / _BINS) ** 2
            limits = [[-_REACH, _REACH]] * 2
            place.hist2d(*points.numpy().T, bins=_BINS, range=limits, vmin=0, vmax=most, cmap="magma")
    figure.savefig(folder / "samples.png", dpi=110)


def draw_map(landed: ByRule, folder: Path) -> None:
    """Draw GRID and where it lands in map.png, each point in the colour of its direction at the start."""
    found = {rule: {"noise": GRID, **at} for rule, at in landed.items()}
    figure, axes = _panels(found)
    for line, at in zip(axes, found.values(), strict=True):
        for place, (name, points) in zip(line, at.items(), strict=True):
            place.scatter(*points.numpy().T, c=np.arctan2(*GRID.numpy().T), cmap="hsv", s=1, linewidths=0)
            reach = 2.6 if name == "noise" else _REACH
            place.set(xlim=(-reach, reach), ylim=(-reach, reach))
    figure.savefig(folder / "map.png", dpi=110)


def _panels(found: ByRule) -> tuple[Figure, Any]:
    columns = len(next(iter(found.values())))
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), columns, squeeze=False)
    for line, (rule, at) in zip(axes, found.items(), strict=True):
        for place, name in zip(line, at, strict=True):
            place.set(xticks=[], yticks=[], aspect="equal")
            place.set_title(f"{rule}, {name}", fontsize=8)
    return figure, axes


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], floor: float, folder: Path) -> None:
    """Draw KL against points seen in curves.png: a panel a number of steps, a line a rule, and the floor."""
    numbers = [int(key) for key in next(iter(curves.values()))[0] if key.isdigit()]
    figure = Figure(figsize=(3.4 * len(numbers), 3.2), layout="constrained")
    axes = figure.subplots(1, len(numbers), squeeze=False, sharey=True)[0]
    for place, number in zip(axes, numbers, strict=True):
        for rule, curve in curves.items():
            place.plot(
                [row["points"] for row in curve], [row[str(number)] for row in curve], "o-", label=rule
            )
        place.axhline(floor, color="grey", linestyle=":", label="floor")
        place.set(title=title(number), xlabel="points seen", xscale="log", yscale="log")
    axes[0].set(ylabel="KL(data || samples), nats")
    axes[0].legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=110)
