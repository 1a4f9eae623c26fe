"""Run folders as one HTML page: what was trained, how it went, how good it is, what it looks like.

It asks for nothing else (inline SVG, data URIs, no script), and the same input gives the same bytes. Names,
captions and all else read from a folder are untrusted text and are escaped. `report.html` lays the page out.
"""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..data.shards import write_atomically
from .charts import BINNED, BINS, COLOURS, CURVE_POINTS, MODELS, Line, Row, chart, means, number, points
from .comparison import bin_charts, compared
from .jump_tables import jump_tables
from .likelihood_tables import likelihoods

METRICS = ("frechet", "ratio", "kernel", "endpoint_error", "seconds_per_sample")
ABOUT = ("model", "nfe", "sampler", "caption_gain_error")
COMPARABLE = ("features_hash", "num_samples", "guidance", "reference")  # lines of validation.jsonl
RUN_PARTS = ("recipe.yaml", "versions.json", "log.jsonl", "samples")
GRID_GAP = 2  # pixels between two images of a grid, transparent so that they suit a light and a dark page


def shown(value: Any) -> str:
    """Format a value for a reader: four significant digits, thousands separated, a dash for nothing."""
    if not math.isfinite(number(value)):
        return "–" if value is None else str(value)
    grouped = value == 0 or isinstance(value, int) or 1e4 <= abs(value) < 1e12
    return f"{value:,.0f}" if grouped else f"{value:#.4g}".rstrip(".")


def parse(text: bytes) -> Row | None:
    """Parse a JSON object, None for anything else."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read_json(path: Path) -> Row:
    """Read a JSON object; raises ValueError naming the file when it holds anything else."""
    content = parse(path.read_bytes())
    if content is None:
        raise ValueError(f"{path} holds no JSON object, expected {{...}}: write it again or move it away")
    return content


def read_log(path: Path) -> tuple[list[Row], int]:
    """Read log lines by step, the last one of a repeated step, and count the lines that cannot be read.

    A killed process leaves a truncated last line, and a resumed one may write behind it: neither is an error.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [row for row in map(parse, lines) if row and isinstance(row.get("step"), int)]
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)], len(lines) - len(rows)


def read_samples(folder: Path) -> dict[str, Any]:
    """Read PNGs as (caption, data URI): MODEL-nfe-NUMBER share their noise and become rows and columns."""
    table: dict[str, dict[int, tuple[str, str]]] = {}
    others = []
    for path in sorted(folder.glob("*.png")):
        picture = (path.name, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        match = re.fullmatch(r"(.+)-nfe-(\d+)\.png", path.name)
        if match and int(match[2]) not in table.get(match[1], {}):
            table.setdefault(match[1], {})[int(match[2])] = picture
        else:
            others.append(picture)
    columns = sorted({nfe for row in table.values() for nfe in row})
    rows = sorted(table.items(), key=lambda row: (row[0] != "teacher", row[0] != "student", row[0]))
    return {"columns": columns, "rows": rows, "others": others}


def read_run(folder: Path, name: str, evaluation: Path | None) -> dict[str, Any]:
    """Read one run folder into what the page shows; raises ValueError for a folder that is no run."""
    if not any((folder / part).exists() for part in RUN_PARTS):
        raise ValueError(f"{folder} is no run, it has none of {RUN_PARTS}: name one `driftmap train` wrote")
    log, unreadable = read_log(folder / "log.jsonl")
    recipe, versions, bits = (folder / name for name in ("recipe.yaml", "versions.json", "likelihood.json"))
    return {
        "name": name,
        "evaluation": read_evaluation(evaluation) if evaluation and evaluation.is_file() else None,
        "log": log,
        "unreadable": unreadable,
        "not_finite": sum(not math.isfinite(y) for y in points(log, "step", "loss")[1]),
        "charts": log_charts(log) + validation_charts(read_log(folder / "validation.jsonl")[0]),
        "samples": read_samples(folder / "samples"),
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        "versions": read_json(versions) if versions.is_file() else {},
        "likelihood": read_json(bits) if bits.is_file() else {},
        "published": published(folder / "published.json"),
    }


def published(path: Path) -> Row:
    """Read where a run was published: only addresses of the web become links."""
    told = read_json(path) if path.is_file() else {}
    links = {key: told[key] for key in ("address", "space") if re.match("https?://", str(told.get(key)))}
    return {"repository": told.get("repository", ""), **links} if "address" in links else {}


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read evaluation.json and draws it; raises ValueError naming a row without a model or evaluations."""
    evaluation = read_json(path)
    for place, row in enumerate(evaluation.setdefault("rows", [])):
        if not (isinstance(row, dict) and row.get("model") in MODELS and number(row.get("nfe")) >= 1):
            wanted = "`model` (teacher or student) and `nfe` (1 or more): run `driftmap evaluate` again"
            raise ValueError(f"{path}: row {place} is {row!r}, expected {wanted}")
    rows = sorted(evaluation["rows"], key=lambda row: row["nfe"])
    given = {key for row in rows for key, value in row.items() if value is not None}
    extra = dict.fromkeys(key for row in rows for key in row if key not in (*METRICS, *ABOUT))
    metrics = [key for key in (*METRICS, *extra) if key in given]
    floors = floor_ratios(evaluation)
    return evaluation | {
        "rows": rows,
        "metrics": metrics,
        "headline": headline(evaluation),
        "ratio_chart": evaluation_chart(rows, "ratio", floors),
        "time_chart": evaluation_chart(rows, "ratio", floors, x="seconds_per_sample"),
        "error_chart": evaluation_chart(rows, "endpoint_error", {}),
        "jump_tables": jump_tables(evaluation),
    }


def headline(evaluation: dict[str, Any]) -> str:
    """Say in a sentence how few evaluations the student needs: the fewest within 5 % of its best."""
    ratios: dict[str, dict[int, float]] = {model: {} for model in MODELS}
    for row in evaluation["rows"]:
        if math.isfinite(number(row.get("ratio"))):
            ratios[row["model"]][row["nfe"]] = row["ratio"]
    student, teacher = ratios["student"], ratios["teacher"]
    if not student:
        return ""
    nfe = min(nfe for nfe, ratio in student.items() if ratio <= 1.05 * min(student.values()))
    many = evaluation.get("many_nfe", "many")
    reached = f"the student reaches {student[nfe]:.2f} times the teacher's Fréchet distance in {many}"
    ending = f"; the teacher itself in {nfe}: {teacher[nfe]:.2f}." if nfe in teacher else "."
    return f"In {nfe} evaluation{'s' * (nfe != 1)} {reached}{ending}"


def floor_ratios(evaluation: dict[str, Any]) -> dict[str, float]:
    """Give the Fréchet floors in the unit of `ratio`: the teacher's distance in many steps."""
    for row in evaluation["rows"]:
        unit = number(row.get("frechet")) / (number(row.get("ratio")) or math.nan)
        if unit > 0:
            floor = sorted(evaluation.get("floor", {}).items())
            return {name: number(values.get("frechet")) / unit for name, values in floor}
    return {}


def evaluation_chart(
    rows: Sequence[Row], metric: str, floor: dict[str, float], *, x: str = "nfe"
) -> Markup | None:
    """Draw a metric of both models against evaluations or time, floors dashed; None when no row has it."""
    lines = []
    for model, style in zip(MODELS, ("s-", "o-"), strict=True):
        ours = sorted((row for row in rows if row["model"] == model), key=lambda row: number(row.get(x)))
        columns = points([row for row in ours if row.get(metric) is not None], x, metric)
        lines += [Line(model, *columns, COLOURS[model], style)] if columns[0] else []
    if not lines:
        return None
    ticks = sorted({place for line in lines for place in line.x}) if x == "nfe" else ()
    for style, name in zip(("--", ":"), floor, strict=False):
        lines.append(Line(f"floor: {name}", [], [floor[name]], COLOURS["ink-soft"], style))
    label = "network evaluations per sample" if x == "nfe" else "seconds per sample"
    return chart(lines, label, ticks=ticks, logarithmic="y" if x == "nfe" else "xy")


def log_charts(log: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Draw losses in one chart, errors in another, and the bins of an error in one of their own."""
    charts: dict[str, dict[str, str]] = {}
    keys = {key for row in log for key in row if key.startswith(("loss", "error"))}
    for key in sorted(keys, key=lambda key: (key.startswith("error"), len(key), key)):
        binned = BINNED.fullmatch(key)
        title = f"{binned[1]} by {BINS[binned[2]]}" if binned else "Loss" if key[0] == "l" else "Error"
        charts.setdefault(title, {})[binned[3] if binned else key] = key
    drawn = []
    for title, labels in charts.items():
        lines = []
        for place, (label, key) in enumerate(labels.items()):
            bin_colour = f"#fe00{100 * place // len(labels):02}"
            colour = COLOURS[f"series-{place % 6}"] if title in ("Loss", "Error") else bin_colour
            x, y = map(means, points(log, "step", key))
            lines.append(Line(label, x, y, colour, "-" if x[1:] else "."))
        drawn.append((title, chart(lines, "step")))
    return drawn


def validation_charts(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Draw what the mean weights did while the run trained: held-out loss, distances like the last one's."""
    losses = points(rows, "step", "loss")
    drawn = []
    if losses[0]:
        line = Line("loss", *losses, COLOURS["series-0"], "o-")
        drawn.append(("Held-out loss of the mean weights", chart([line], "step")))
    tables = [row for row in rows if row.get("rows")]
    alike = [row for row in tables if all(row.get(key) == tables[-1].get(key) for key in COMPARABLE)]
    if alike:
        by_nfe: dict[int, list[Row]] = {}
        for row in alike:
            for each in row["rows"]:
                by_nfe.setdefault(each["nfe"], []).append({"step": row["step"], **each})
        lines = [
            Line(f"in {nfe}", *points(each, "step", "frechet"), COLOURS[f"series-{place % 6}"], "o-")
            for place, (nfe, each) in enumerate(sorted(by_nfe.items()))
        ]
        for style, (name, floor) in zip(("--", ":"), sorted(alike[-1]["floor"].items()), strict=False):
            lines.append(Line(f"floor: {name}", [], [floor["frechet"]], COLOURS["ink-soft"], style))
        drawn.append((f"Fréchet distance of the mean weights, {alike[-1]['features']}", chart(lines, "step")))
    return drawn


def grid(images: Tensor, columns: int) -> bytes:
    """Give PNG bytes of images (N, C, H, W), uint8 with 1 or 3 channels, laid out row by row."""
    wrong_shape = images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images)
    if images.dtype != torch.uint8 or wrong_shape or columns < 1:
        found = f"{images.dtype} {tuple(images.shape)} in {columns} columns"
        raise ValueError(f"a grid takes uint8 images (N, 1 or 3, H, W) in 1 column or more, found {found}")
    count, _, height, width = images.shape
    rows, columns = -(-count // columns), min(columns, count)
    cells = torch.zeros(rows * columns, 4, height + GRID_GAP, width + GRID_GAP, dtype=torch.uint8)
    cells[:count, :3, :height, :width] = images.cpu()
    cells[:count, 3, :height, :width] = 255
    canvas = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    buffer = io.BytesIO()
    Image.fromarray(canvas[:-GRID_GAP, :-GRID_GAP].contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def write_report(out: Path, *, runs: list[Path], evaluation: Path | None) -> Path:
    """Write one page about run folders, those with an evaluation.json side by side; returns its path.

    `evaluation` is the one of the first run. Raises ValueError for no runs, a folder that is no run, and a
    file that cannot be read. A part that is not there yet is no error: the page says what is missing and
    which command makes it.
    """
    if not runs:
        raise ValueError("a report needs at least one run: name the folder that `driftmap train` wrote")
    files = [evaluation, *(run / "evaluation.json" for run in runs[1:])]
    read = [read_run(*each) for each in zip(runs, names_of(runs), files, strict=True)]
    text = template_of("report.html").render(
        runs=read,
        evaluations=[run for run in read if run["evaluation"]],
        groups=compared(read),
        bins=bin_charts(read),
        likelihoods=likelihoods(read),
        most=CURVE_POINTS,
    )
    write_atomically(out, text.encode("utf-8", errors="replace"))  # a file name may hold what is no UTF-8
    return out


def template_of(name: str) -> jinja2.Template:
    """Give a page of this folder, which escapes what it is given, to be rendered."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    page = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["shown"] = shown
    return page.get_template(name)


def names_of(runs: Sequence[Path]) -> list[str]:
    """Give runs the names of their folders, and of the folders above where these are the same."""
    names = [run.resolve().name for run in runs]
    return [
        f"{run.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]
