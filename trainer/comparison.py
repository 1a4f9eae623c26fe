"""Several runs side by side: what is comparable stands in one chart, what is not stands alone.

Numbers are comparable where features, number of samples and reference pictures are the same; pictures have
the same noise where the seed is the same too.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from .charts import BINNED, BINS, COLOURS, Line, Row, chart, number, points, run_line

SAME = ("features", "features_hash", "num_samples", "num_references", "reference")
LAST_SHARE = 10  # a loss at the end of training is the mean of the last tenth of its log


def compared(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Give the groups of two or more runs whose evaluations are comparable, ready to be shown."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for run in runs:
        if run["evaluation"] and run["evaluation"]["rows"]:
            groups.setdefault(tuple(map(run["evaluation"].get, SAME)), []).append(run)
    return [_group(group) for group in groups.values() if len(group) > 1]


def bin_charts(runs: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Draw what every run's log ends with by bin, one chart a kind of loss that two or more have."""
    kinds: dict[tuple[str, str], list[Line]] = {}
    for place, run in enumerate(runs):
        for kind, bins in _last_bins(run["log"]).items():
            x, y = zip(*sorted(bins.items()), strict=True)
            kinds.setdefault(kind, []).append(run_line(run["name"], x, y, place))
    return [
        (f"{kind} by {BINS[by]} at the end", chart(lines, "bin"))
        for (kind, by), lines in sorted(kinds.items(), reverse=True)
        if len(lines) > 1
    ]


def _group(runs: list[Row]) -> dict[str, Any]:
    """Give charts, a table and pictures of runs that are comparable; a teacher of several stands once."""
    first, columns = runs[0]["evaluation"], _columns(runs)
    chance = first.get("floor", {}).get("self", {}).get("frechet")
    charts = {}
    names = [run["name"] for run in runs]
    for x, label in (("nfe", "network evaluations per sample"), ("seconds_per_sample", "seconds per sample")):
        lines = []
        for name, rows in columns.items():
            line = points(sorted(rows, key=lambda row: number(row.get(x))), x, "frechet")
            place = names.index(name) if name in names else None
            lines += [run_line(name, *line, place)] if line[0] else []
        ticks = sorted({tick for line in lines for tick in line.x}) if x == "nfe" else ()
        if lines and chance:
            lines.append(Line("floor: self", [], [chance], COLOURS["ink-soft"], "--"))
        charts[x] = (
            chart(lines, label, ticks=ticks, logarithmic="y" if x == "nfe" else "xy") if lines else None
        )
    return {
        "names": names,
        "about": {key: first.get(key) for key in ("features", "num_samples", "reference")},
        "floor": {run["name"]: run["evaluation"].get("floor", {}) for run in runs},
        "blind": [run["name"] for run in runs if "frechet" in run["evaluation"].get("blind", ())],
        "charts": charts,
        "nfe": sorted({row["nfe"] for rows in columns.values() for row in rows}),
        "rows": [(name, {row["nfe"]: row.get("frechet") for row in rows}) for name, rows in columns.items()],
        "samples": _samples(runs) if len({run["evaluation"].get("seed") for run in runs}) == 1 else None,
    }


def _columns(runs: list[Row]) -> dict[str, list[Row]]:
    """Give every run's rows by its name, then those of teachers, each that differs.

    A run without a student's rows is a teacher itself.
    """
    found: dict[str, list[Row]] = {}
    teachers: dict[str, tuple[str, list[Row]]] = {}
    for run in runs:
        rows = run["evaluation"]["rows"]
        learned = [row for row in rows if row["model"] == "student"]
        taught = [row for row in rows if row["model"] == "teacher"]
        found[run["name"]] = learned or taught
        if not learned:
            continue
        told = repr([(row["nfe"], row.get("frechet")) for row in taught])
        teachers.setdefault(told, (f"teacher of {run['name']}", taught))
    if len(teachers) == 1:
        found["the teacher"] = next(iter(teachers.values()))[1]
    else:
        found |= dict(teachers.values())
    return {name: rows for name, rows in found.items() if rows}


def _samples(runs: list[Row]) -> dict[str, Any] | None:
    """Give the pictures of all runs by number of evaluations, and take them from the runs' own parts.

    A row like an earlier one, as that of a teacher of several, is left out.
    """
    rows: dict[tuple[Any, ...], tuple[str, dict[int, Any]]] = {}
    for run in runs:
        for name, pictures in run["samples"]["rows"]:
            rows.setdefault(tuple(pictures.values()), (f"{run['name']}: {name}", pictures))
        run["samples"]["rows"] = []
    columns = sorted({nfe for _, pictures in rows.values() for nfe in pictures})
    return {"columns": columns, "rows": list(rows.values())} if rows else None


def _last_bins(log: Sequence[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """Give the means of the last tenth of a log, by kind of loss, what its bins are of, and bin."""
    last = log[-max(1, len(log) // LAST_SHARE) :]
    bins: dict[tuple[str, str], dict[int, float]] = {}
    for key in sorted({key for row in last for key in row}):
        if (binned := BINNED.fullmatch(key)) and key.startswith(("loss", "error")):
            values = points(last, "step", key)[1]
            bins.setdefault((binned[1], binned[2]), {})[int(binned[3])] = sum(values) / len(values)
    return bins
