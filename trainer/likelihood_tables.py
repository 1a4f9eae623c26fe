"""Likelihoods of runs in tables, a column a measure: a bound and a density are not to be compared."""

from collections.abc import Sequence
from typing import Any

from .charts import Row, chart, number, run_line
from .rate_distortion import Curve, curve

MEASURES = {
    "bound_bits_per_dim": "Variational bound",
    "iw_bound_bits_per_dim": "Importance-weighted bound",
    "ode_bits_per_dim": "Density of the flow",
    "exact_bits_per_dim": "Density of the discrete flow",
}


def likelihoods(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Give a table for each data set and space, with the rate-distortion curves of its runs.

    Raises ValueError naming a run whose likelihood.json is not what `driftmap likelihood` writes.
    """
    groups: dict[tuple[Any, Any], list[tuple[str, Row]]] = {}
    for run in runs:
        rows = {key: run["likelihood"][key] for key in MEASURES if key in run["likelihood"]}
        for row in rows.values():
            if not isinstance(row, dict) or not {"value", "standard_error", "data", "space"} <= row.keys():
                raise ValueError(f"likelihood.json of {run['name']} is not whole: run `driftmap likelihood`")
        if rows:
            first = next(iter(rows.values()))
            groups.setdefault((first["data"], first["space"]), []).append((run["name"], rows))
    return [_group(data, space, group) for (data, space), group in groups.items()]


def _group(data: Any, space: Any, runs: list[tuple[str, Row]]) -> dict[str, Any]:
    """Give the table and the charts of runs on the same data."""
    found = {key: title for key, title in MEASURES.items() if any(key in rows for _, rows in runs)}
    curves: dict[str, list[tuple[int, str, Curve]]] = {}
    for place, (name, rows) in enumerate(runs):
        bound = rows.get("bound_bits_per_dim", {})
        if "by_step" in bound:
            drawn = curve(bound)
            curves.setdefault(drawn.unit, []).append((place, name, drawn))
    charts = []
    for unit, drawn in curves.items():
        lines = [
            run_line(name, each.rates, each.distortions, place, style="-") for place, name, each in drawn
        ]
        charts.append((unit, chart(lines, "rate, bits a dimension", logarithmic="")))
    cells = [
        (name, {key: (number(row["value"]), number(row["standard_error"])) for key, row in rows.items()})
        for name, rows in runs
    ]
    return {"data": data, "space": space, "measures": found, "rows": cells, "charts": charts}
