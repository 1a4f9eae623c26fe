"""What a model card says to programs: the metadata, base models, measured distances, and their picture."""

import io
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..data.shards import ShardSet
from ..trainer.build import run_recipe
from ..trainer.report import read_json

COLUMNS = {
    "frechet": "Fréchet distance",
    "ratio": "times the teacher in many",
    "class_accuracy": "class accuracy",
    "caption_alignment": "caption alignment",
    "endpoint_error": "end-point error",
}
PUBLISHED = "published.json"  # of a run: where it was published
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def metadata(
    run: Path,
    evaluation: dict[str, Any],
    shards: ShardSet,
    repository: str,
    *,
    licence: str | None,
    text: bool,
    few: bool,
) -> str:
    """Return the card's metadata as YAML, with the student's distances as the Hub's model-index."""
    task = "text-to-image" if text else "unconditional-image-generation"
    address = str(shards.folder)
    hub = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+).*", address)
    name = shards.info.get("name") or Path(address).name
    key = measure_of(evaluation)
    features = f", {evaluation.get('features')}" if key == "frechet" else ""
    results = [
        EvalResult(
            task_type=task,
            dataset_type=hub[1] if hub else "custom",
            dataset_name=f"held-out split of {name}",
            metric_type="frechet-distance" if key == "frechet" else "end-point-error",
            metric_name=f"{COLUMNS[key]}, {evaluations(nfe)}{features}",
            metric_value=value,
        )
        for nfe, value in measured(evaluation, "student", key)
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base_models(run) or None,
        datasets=[hub[1]] if hub else None,
        license=licence,
        tags=["flow-map", "few-step", "driftmap"] if few else ["driftmap"],
        model_name=repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def base_models(run: Path) -> list[str]:
    """Return the Hub's ids of what a run began with or was taught by, the nearest that are known."""
    recipe = run_recipe(run)
    sections = recipe["model"], recipe.get("teacher") or {}
    places = [section.get(key) for section in sections for key in ("from_pretrained", "from_run", "run")]
    return sorted({name for place in filter(None, places) for name in _ids(str(place))})


def _ids(place: str) -> list[str]:
    """Return the ids of a run, of a pipeline folder, or of what is an id itself."""
    folder = Path(place)
    if (told := folder / PUBLISHED).is_file():
        return [read_json(told)["repository"]]
    if (folder / "recipe.yaml").is_file():
        return base_models(folder)
    if (told := folder / "model_index.json").is_file():
        place = str(read_json(told).get("_name_or_path"))
    return [place] if HUB_ID.fullmatch(place) and not Path(place).exists() else []


def measure_of(evaluation: dict[str, Any]) -> str:
    """Return what the student is judged by: the Fréchet distance, or end points where that is blind."""
    return "endpoint_error" if "frechet" in evaluation["blind"] else "frechet"


def recommended(evaluation: dict[str, Any]) -> int | None:
    """Return the fewest evaluations within 5 % of the student's best distance; None without any."""
    found = dict(measured(evaluation, "student", "frechet")) if "frechet" not in evaluation["blind"] else {}
    return min((nfe for nfe in found if found[nfe] <= 1.05 * min(found.values())), default=None)


def measured(evaluation: dict[str, Any], model: str, key: str) -> list[tuple[int, float]]:
    """Return (nfe, value) of a model's rows that have a value."""
    rows = [row for row in evaluation["rows"] if row["model"] == model and row.get(key) is not None]
    return [(row["nfe"], row[key]) for row in rows]


def evaluations(nfe: int) -> str:
    """Say how many evaluations."""
    return f"{nfe} evaluation{'s' * (nfe > 1)}"


def quality_chart(evaluation: dict[str, Any]) -> bytes:
    """Draw what the models are judged by against evaluations, and its floors, as PNG."""
    key = measure_of(evaluation)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for model, style in (("teacher", "s--"), ("student", "o-")):
        points = [point for point in measured(evaluation, model, key) if point[1] > 0]
        axes.plot([nfe for nfe, _ in points], [value for _, value in points], style, label=model)
    for name, values in sorted(evaluation["floor"].items()):
        if key in values:
            axes.axhline(values[key], linestyle=":", color="grey", label=f"floor: {name}")
    ticks = sorted({row["nfe"] for row in evaluation["rows"]})
    axes.set(xscale="log", yscale="log", xticks=ticks, xlabel="network evaluations a sample")
    axes.set_ylabel(COLUMNS[key])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xticklabels([str(tick) for tick in ticks])
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()
