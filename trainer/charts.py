"""Lines as inline SVG, in the colours of the page's style sheet; the same lines give the same bytes."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

Row = dict[str, Any]
MODELS = ("teacher", "student")
CURVE_POINTS = 200
MARKERS = "os^DvP"
BINS = {"t": "time bin (0: data)", "gap": "gap bin (0: short jumps)"}  # by the ends of names in a log
BINNED = re.compile(rf"(.+)_({'|'.join(BINS)})(\d+)")

# Variables of the page's style sheet, which says what they are in the light and in the dark. Matplotlib draws
# with stand-ins for them: "#fd00" and a variable's place here, or "#fe00" and a bin's place in percent.
VARIABLES = ("ink-soft", "line", *MODELS, *(f"series-{place}" for place in range(6)))
COLOURS = {name: f"#fd00{place:02}" for place, name in enumerate(VARIABLES)}
CHART_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a log key with a dollar sign is a name, not a formula
    "font.size": 9.5,
    "lines.linewidth": 1.4,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "grid.color": COLOURS["line"],
} | dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), COLOURS["ink-soft"])


@dataclass(frozen=True)
class Line:
    """One line of a chart; one without x is a level that holds for every x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"


def run_line(
    name: str, x: Sequence[float], y: Sequence[float], place: int | None, *, style: str | None = None
) -> Line:
    """Give the line of the run at this place among several, or of a teacher (None)."""
    if place is None:
        return Line(name, x, y, COLOURS["teacher"], style or "s--")
    return Line(name, x, y, COLOURS[f"series-{place % 6}"], style or f"{MARKERS[place % 6]}-")


def number(value: Any) -> float:
    """Give a value as a float, NaN for what is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def points(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Give the columns x and y of the rows that have both."""
    both = [row for row in rows if x in row and y in row]
    return [number(row[x]) for row in both], [number(row[y]) for row in both]


def means(column: Sequence[float]) -> list[float]:
    """Give at most CURVE_POINTS means of equally many neighbours, which keeps a long noisy curve readable."""
    width = -(-len(column) // CURVE_POINTS)
    parts = [column[start : start + width] for start in range(0, len(column), width)]
    return [sum(part) / len(part) for part in parts]


def chart(
    lines: Sequence[Line], label: str, *, ticks: Sequence[float] = (), logarithmic: str = "y"
) -> Markup:
    """Draw lines as inline SVG, with a `logarithmic` y only where none is negative, and x with ticks."""
    # Hashed with the lines, the ids inside are the same in every report and different in every chart.
    with matplotlib.rc_context({**CHART_STYLE, "svg.hashsalt": repr(lines)}):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained", facecolor="none")
        axes = figure.subplots()
        for line in lines:
            if line.x:
                axes.plot(line.x, line.y, line.style, label=line.label, color=line.colour)
            else:
                axes.axhline(line.y[0], label=line.label, color=line.colour, linestyle=line.style)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer="y" in logarithmic))
        if ticks:
            axes.set(xscale="log", xticks=ticks)
        axes.xaxis.set_major_formatter("{x:,.0f}" if "y" in logarithmic else "{x:g}")
        if "x" in logarithmic:
            axes.set(xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            axes.xaxis.set_major_formatter("{x:g}")
        values = [value for line in lines for value in line.y if math.isfinite(value)]
        if "y" in logarithmic and values and min(values) >= 0 < max(values):
            axes.set_yscale("log", nonpositive="mask")  # an exact end point, error 0, is off the scale
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel(label)
        columns = max(1, min(5, 60 // (6 + max(len(line.label) for line in lines))))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.4)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return inline(svg.getvalue())


def inline(svg: str) -> Markup:
    """Turn matplotlib's document, whose labels it has escaped, into an element the page sizes and colours."""
    box, body = re.findall(r'(?s)<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', svg)[0]
    body = re.sub(r"(?s)<style.*?</style>|font-family: [^;<>]*; ", "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # repeated in every chart, and nothing refers to a group
    body = re.sub(r"#fd000(\d)", lambda match: f"var(--{VARIABLES[int(match[1])]})", body)
    body = re.sub(r"#fe00(\d\d)", r"color-mix(in oklch, var(--bin-last) \1%, var(--bin-first))", body)
    return Markup(f"<svg {box}>{body}")
