"""The page of a study: per set the tables, the charts, and what the models do to points of the plane.

It is made of numbers and tensors that were measured before (launch/compare_measure.py); `study.html` lays it
out. Bounds and densities stand in rows of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from ..data.shards import write_atomically
from .charts import COLOURS, Line, Row, chart, run_line
from .point_pictures import CLASSES, class_colours, heat, scatter
from .report import shown, template_of

LATENT_REACH = 3.4  # of N(0, I) in pictures
MEASURES = {"bound": "Bound", "iw": "IW bound", "ode": "Density of the flow", "exact": "Density of the flow"}
MMD = "MMD of samples (evaluations)"
LATENTS = {"process": "process", "flow": "flow"}


def write_page(out: Path, found: dict[str, Any], *, title: str) -> None:
    """Write the page of all sets and methods that were measured so far."""
    sets = [set_of(name, each["about"], each["methods"]) for name, each in found.items() if each["methods"]]
    text = template_of("study.html").render(title=title, sets=sets)
    write_atomically(out, text.encode("utf-8"))


def set_of(name: str, about: Row, methods: dict[str, Row]) -> dict[str, Any]:
    """Return what the page shows of a set."""
    return {
        "name": name,
        "about": about,
        "classes": [(each, CLASSES[place % len(CLASSES)]) for place, each in enumerate(about["classes"])],
        "findings": findings(about, methods),
        "table": table(about, methods),
        "steps": steps_table(methods),
        "latents": latents_table(methods),
        "charts": charts(about, methods),
        "pictures": pictures(about, methods) if "points" in about else None,
    }


def column_of(row: Row) -> str:
    """Return the heading under which a likelihood stands."""
    if row["measure"] in ("ode", "exact"):
        return MEASURES[row["measure"]]
    steps = "continuous" if row["N"] is None else f"N = {row['N']}"
    paths = f", K = {row['K']}" if row["measure"] == "iw" else ""
    return f"{MEASURES[row['measure']]}, {steps}{paths}"


def columns_of(methods: dict[str, Row]) -> list[str]:
    """Return the headings of all likelihoods: bounds by number of steps, weighted bounds, densities."""
    order = list(MEASURES)
    rows = [row for each in methods.values() for row in each["likelihood"]]
    rows.sort(key=lambda row: (order.index(row["measure"]), row["N"] is None, row["N"] or 0))
    return list(dict.fromkeys(column_of(row) for row in rows))


def with_error(value: float, error: float) -> str:
    """Format nats and their standard error."""
    return f"{value:.3f} ± {error:.3f}"


def table(about: Row, methods: dict[str, Row]) -> dict[str, Any]:
    """Return the table of a set: a column a method and one for the data, a row a measure."""
    exact, cells = about.get("exact"), {name: _cells(each) for name, each in methods.items()}
    own = with_error(exact["nats"], exact["error"]) if exact else ""
    likelihoods = columns_of(methods)
    of_data = {**dict.fromkeys(likelihoods, own), MMD: f"{about['floor']:.4f}"}
    headings = [*likelihoods, *dict.fromkeys(key for each in cells.values() for key in each)]
    rows = [
        (heading, [*(each.get(heading, "") for each in cells.values()), of_data.get(heading, "")])
        for heading in dict.fromkeys(headings)
    ]
    return {"columns": [*methods, "data"], "rows": rows}


def _cells(method: Row) -> dict[str, str]:
    """Return what the table says of a method."""
    least = min(method["samples"], key=lambda row: row["discrepancy"])
    return {
        **{column_of(row): with_error(row["nats"], row["error"]) for row in method["likelihood"]},
        MMD: f"{least['discrepancy']:.4f} ({least['evaluations']})",
        "Seconds a step": shown(method["seconds_per_step"]),
        "Evaluations a step": shown(method["step"]["evaluations"]),
        "Tensors of a step, MiB": f"{method['step']['tensor_bytes'] / 2**20:.1f}",
        "Parameters": shown(method["num_parameters"]),
    }


def findings(about: Row, methods: dict[str, Row]) -> list[str]:
    """Say in a sentence each which method is the best by each likelihood that several have."""
    told = []
    for column in columns_of(methods):
        values = {
            name: row["nats"]
            for name, each in methods.items()
            for row in each["likelihood"]
            if column_of(row) == column
        }
        if len(values) > 1:
            order = sorted(values, key=values.__getitem__)
            listed = ", ".join(f"{name} {values[name]:.3f}" for name in order)
            told.append(f"{column}: {listed}.")
    if told and "exact" in about:
        told.append(f"The data’s own density: {about['exact']['nats']:.3f}.")
    return told


def steps_table(methods: dict[str, Row]) -> dict[str, Any]:
    """Return the discrepancy of samples, a row a sampler, a column a number of steps."""
    columns = sorted({row["steps"] for each in methods.values() for row in each["samples"]})
    rows = []
    for name, each in methods.items():
        for sampler in dict.fromkeys(row["sampler"] for row in each["samples"]):
            cells = {row["steps"]: row for row in each["samples"] if row["sampler"] == sampler}
            values = [
                f"{cells[steps]['discrepancy']:.4f} ({cells[steps]['evaluations']})" if steps in cells else ""
                for steps in columns
            ]
            rows.append((f"{name}, {sampler}", values))
    return {"columns": columns, "rows": rows}


def latents_table(methods: dict[str, Row]) -> dict[str, Any]:
    """Return how latents lie: whether they fill the Gaussian, and whether classes stay apart."""
    rows = []
    for name, each in methods.items():
        for kind, label in LATENTS.items():
            if (found := each.get(kind)) is not None:
                apart = f"{found['purity']:.3f}" if "purity" in found else ""
                chance = f"{found['chance']:.3f}" if "chance" in found else ""
                filled = [f"{found['discrepancy']:.4f}", f"{found['floor']:.4f}"]
                rows.append((f"{name}, {label}", [*filled, apart, chance]))
    return {"columns": ["MMD from N(0, I)", "floor", "neighbours of the own class", "chance"], "rows": rows}


def charts(about: Row, methods: dict[str, Row]) -> list[tuple[str, Markup]]:
    """Draw bounds against the number of steps, and discrepancies against evaluations."""
    bounds, samples = [], []
    for place, (name, each) in enumerate(methods.items()):
        rows = sorted(
            (row for row in each["likelihood"] if row["measure"] == "bound" and row["N"]),
            key=lambda row: row["N"],
        )
        if rows:
            bounds.append(run_line(name, [row["N"] for row in rows], [row["nats"] for row in rows], place))
        made = sorted(each["samples"], key=lambda row: (row["sampler"], row["evaluations"]))
        first = [row for row in made if row["sampler"] == each["samples"][0]["sampler"]]
        x, y = [row["evaluations"] for row in first], [row["discrepancy"] for row in first]
        samples.append(run_line(name, x, y, place))
    drawn = []
    if bounds:
        ticks = sorted({tick for line in bounds for tick in line.x})
        if "exact" in about:
            bounds.append(Line("the data’s own", [], [about["exact"]["nats"]], COLOURS["ink-soft"], "--"))
        drawn.append(("Bound, nats", chart(bounds, "steps of the chain, N", ticks=ticks, logarithmic="")))
    samples.append(Line("floor", [], [about["floor"]], COLOURS["ink-soft"], "--"))
    drawn.append(
        ("Discrepancy of samples", chart(samples, "network evaluations per sample", logarithmic="xy"))
    )
    return drawn


def pictures(about: Row, methods: dict[str, Row]) -> list[dict[str, Any]]:
    """Return the tables of pictures of a set of the plane: a row a method."""
    points, reach = about["points"], about["grid"]
    wide = max(reach, LATENT_REACH)
    colours = class_colours(about["labels"], len(points))
    times = ["data", "t = 0.25", "t = 0.5", "t = 0.75", "latents"]
    forward = [
        (f"{name}, {label}", [scatter(state, colours, reach=wide) for state in each[kind]["states"]])
        for name, each in methods.items()
        for kind, label in LATENTS.items()
        if each.get(kind) is not None
    ]
    back = [
        (name, [scatter(state, _ends(each["backward"][-1], about), reach=wide) for state in each["backward"]])
        for name, each in methods.items()
        if "backward" in each
    ]
    numbers = sorted({row["steps"] for _, rows in _first_sampler(methods) for row in rows})
    made = []
    for name, rows in _first_sampler(methods):
        drawn = {
            row["steps"]: scatter(row["points"], _ends(row["points"], about), reach=reach) for row in rows
        }
        made.append((name, [drawn.get(number) for number in numbers]))
    parts = [f"{100 * place // 4} % of the steps" for place in range(1, 4)]
    return [
        {"title": "Densities", "note": DENSITY, "columns": [], "rows": [("", densities(about, methods))]},
        {"title": "Forward", "note": FORWARD, "columns": times, "rows": forward},
        {"title": "Backward", "note": BACKWARD, "columns": ["noise", *parts, "samples"], "rows": back},
        {
            "title": "Samples against number of steps",
            "note": SAMPLES,
            "columns": [f"{number} step{'s' * (number > 1)}" for number in numbers],
            "rows": made,
        },
    ]


DENSITY = "One scale for all, from none (black); colours go by the power 0.6, so that faint mass is seen."
FORWARD = (
    "Test points in the colours of their classes, in the process that a model reverses and along its flow. "
    "The same points in every row."
)
BACKWARD = (
    "From noise to samples; each point has, on its whole way, the class of the test point it ends nearest to."
)
SAMPLES = "The first sampler of each method, from the same noise, coloured by the nearest test point."


def densities(about: Row, methods: dict[str, Row]) -> list[tuple[str, str]]:
    """Return captions and pictures of densities, the data's own first."""
    grids = {name: each["density"] for name, each in methods.items() if "density" in each}
    if "density" in about:
        grids = {"data": about["density"], **grids}
    most = float(next(iter(grids.values())).flatten().quantile(0.995)) if grids else 1.0
    return [(name, heat(grid, most=max(most, 1e-9))) for name, grid in grids.items()]


def _first_sampler(methods: dict[str, Row]) -> list[tuple[str, Sequence[Row]]]:
    found = []
    for name, each in methods.items():
        rows = [row for row in each["samples"] if row["sampler"] == each["samples"][0]["sampler"]]
        found.append((name, sorted(rows, key=lambda row: row["steps"])))
    return found


def _ends(ends: Tensor, about: Row) -> Any:
    """Return the colours of points that end there: those of the nearest test points."""
    nearest = torch.cat([torch.cdist(part, about["points"]).argmin(1) for part in ends.split(512)])
    labels = None if about["labels"] is None else about["labels"][nearest]
    return class_colours(labels, len(ends))
