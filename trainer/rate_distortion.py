"""Rate and distortion of progressive coding: what the first bits of a code of the data are worth.

A code that sends x_N, then each x_{n-1} given x_n, has sent after x_n

    rate(n) = L_N + sum_{m > n} L_{m-1}            bits, and the receiver's best guess of the data misses by
    distortion(n) = sqrt( mean |data - E[data | x_n]|^2 )

and L_0 more bits send the data themselves. Source: Ho et al. 2020, section 4.3 and table 4.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .likelihood import PIXEL_SCALE


@dataclass(frozen=True)
class Curve:
    """Rates in bits a dimension and distortions, from n = N down to 1, and 0 where the code is lossless."""

    steps: list[int]
    rates: list[float]
    distortions: list[float]
    unit: str


def curve(bound: dict[str, Any]) -> Curve:
    """Return the curve of a `bound_bits_per_dim` row with all its terms; ValueError where it has not."""
    if "by_step" not in bound:
        raise ValueError(
            f"this bound has {bound.get('terms_computed', 'no terms')}, a rate-distortion curve needs all: "
            "measure it without drawn steps"
        )
    rates = list(accumulate([bound["terms"]["L_N"], *reversed(bound["by_step"]["bits_per_dim"])]))
    lossless = bound["decoder"] == "discretised"
    scale = PIXEL_SCALE if lossless else 1.0
    distortions = [scale * error**0.5 for error in reversed(bound["by_step"]["square_error"])]
    steps = list(range(len(distortions), 0, -1))
    if lossless:
        steps, distortions = [*steps, 0], [*distortions, 0.0]
    unit = "RMSE on the scale 0..255" if lossless else "RMSE in the network's units"
    return Curve(steps, rates[: len(steps)], distortions, unit)


def chart(curves: Mapping[str, Curve]) -> bytes:
    """Return an SVG of curves by their names, those of one unit together; the same curves, the same bytes."""
    units = list(dict.fromkeys(each.unit for each in curves.values()))
    with rc_context({"svg.hashsalt": repr(curves), "svg.fonttype": "none", "font.size": 9.5}):
        figure = Figure(figsize=(4.8 * len(units), 3.1), layout="constrained")
        for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
            for name, each in curves.items():
                if each.unit == unit:
                    axes.plot(each.rates, each.distortions, label=name, linewidth=1.4)
            axes.set(xlabel="rate, bits a dimension", ylabel=unit, ylim=(0, None))
            axes.grid(linewidth=0.4)
            axes.legend(frameon=False)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return svg.getvalue()
