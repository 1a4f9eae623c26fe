"""The model card of a run: what it is, how good, of which data, by which compute; and its metadata.

Every number of quality is one of evaluation.json; all others are of the recipe, the log and the data's card.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ..data.shards import ShardSet
from ..models.flow_map import FlowMap
from ..trainer.build import run_recipe, settings_of_run, shards_of_run
from ..trainer.report import read_evaluation, read_json, read_log, shown
from .card_data import COLUMNS, evaluations, metadata, quality_chart
from .export import Exported
from .export_pretrained import is_of_checkpoint

FLOORS = {
    "self": "training pictures against held-out ones",
    "reconstruction": "held-out pictures against their reconstructions by the autoencoder",
}


@dataclass(frozen=True)
class Card:
    """The text of README.md, and the pictures that it shows by name."""

    text: str
    pictures: dict[str, bytes]


def card_of(
    run: Path,
    model: FlowMap,
    chosen: Exported,
    folder: Path,
    *,
    repository: str,
    evaluation: Path | None = None,
    licence: str | None = None,
    base_licence: str | None = None,
) -> Card:
    """Return the model card of a run that was exported to a folder and is published as `repository`."""
    file = evaluation or run / "evaluation.json"
    found = read_evaluation(file) if file.is_file() else {"rows": [], "floor": {}, "blind": []}
    shards = shards_of_run(run)
    pictures = (
        {} if not found["rows"] else dict(_pictures(run, found)) | {"quality.png": quality_chart(found)}
    )
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["shown"] = shown
    template = page.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    about_model = _about_model(run, model, chosen, folder)
    text = template.render(
        **about_model,
        **_about_quality(found, pictures),
        **_about_training(run, model),
        repository=repository,
        name=repository.rpartition("/")[2],
        base_licence=base_licence,
        sets=[_about_data(each) for each in _sets(run, shards)],
    )
    about = metadata(
        run,
        found,
        shards,
        repository,
        licence=licence or base_licence,
        text=bool(model.text_width),
        few=about_model["few"],
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    return Card(f"---\n{about}\n---\n\n{text}", pictures)


def _pictures(run: Path, evaluation: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the grids of the student at every number of evaluations and of the teacher at many."""
    wanted = [("student", row["nfe"]) for row in evaluation["rows"] if row["model"] == "student"]
    for model, nfe in [*wanted, ("teacher", evaluation.get("many_nfe", 0))]:
        file = run / "samples" / f"{model}-nfe-{nfe:03d}.png"
        if file.is_file():
            yield file.name, file.read_bytes()


def _about_quality(evaluation: dict[str, Any], pictures: dict[str, bytes]) -> dict[str, Any]:
    rows, blind = evaluation["rows"], evaluation["blind"]
    given = {key for row in rows for key, value in row.items() if value is not None}
    columns = {key: name for key, name in COLUMNS.items() if key in given and key not in blind}
    captions = []
    for name in pictures:
        model, _, nfe = name.removesuffix(".png").rpartition("-nfe-")
        if model:
            captions.append((name, f"The {model} in {evaluations(int(nfe))}"))
    measured = sorted({row["nfe"] for row in rows if row["model"] == "student"})
    listed = [str(nfe) for nfe in measured]
    return {
        "evaluation": evaluation,
        "rows": [{"sampler": "", **dict.fromkeys(columns), **row} for row in rows],
        "columns": columns,
        "floors": FLOORS,
        "blind": [COLUMNS.get(name, name.replace("_", " ")) for name in blind],
        "pictures": captions,
        "measured": listed,
        "nfe_text": " or ".join([", ".join(listed[:-1]), listed[-1]][len(listed) < 2 :])
        if listed
        else "a few",
    }


def _about_model(run: Path, model: FlowMap, chosen: Exported, folder: Path) -> dict[str, Any]:
    index, network = read_json(folder / "model_index.json"), settings_of_run(run)["name"]
    vae = folder / "vae" / "config.json"
    scale = 2 ** (len(read_json(vae)["block_out_channels"]) - 1) if vae.is_file() else 1
    classes = list(index.get("id2label", {}).values())
    by_class = isinstance(model.null_condition, int)
    if model.text_width:
        what, asked = "pictures of captions", 'prompt="a caption", '
    else:
        what, asked = ("pictures by class", f"class_labels=[{json.dumps([*classes, 0][0])}], ")
        what, asked = (what, asked) if by_class else ("pictures", "")
    few = getattr(model.backbone, "two_times", True)  # one time: a checkpoint that was only trained on
    if few and is_of_checkpoint(run) and asked:
        asked += "guidance_scale=1.0, " if model.text_width else ""
    encoder = index.get("caption_encoder")
    if encoder:
        encoder["fingerprint"] = shards_of_run(run).info["text"]["encoder"]
    guided = "Guidance was learned in distillation and cannot be changed."
    if model.takes_guidance:
        guided = f"`guidance_scale` is an input of the network, by default {chosen.guidance:g}."
    elif not few:
        guided = "Guidance is the pipeline's, at two evaluations a step."
    return {
        "what": what,
        "asked": asked,
        "size": f"{model.sample_shape[-1] * scale} x {model.sample_shape[-1] * scale}",
        "nfe": chosen.nfe if few else 50,
        "few": few,
        "trusted": isinstance(index["_class_name"], list),
        "lora": (folder / "lora").is_dir(),
        "classes": [re.sub(r"[^\w .,'()+-]", "", str(name)) for name in classes[:100]],
        "encoder": encoder,
        "variants": chosen.variants,
        "weights": Path(chosen.weights).name,
        "network": network,
        "own_network": (folder / "transformer").is_dir(),
        "guidance": guided,
    }


def _about_training(run: Path, model: FlowMap) -> dict[str, Any]:
    recipe = run_recipe(run)
    versions = read_json(run / "versions.json")
    teacher = recipe.get("teacher") or {}
    start = recipe["model"].get("from_pretrained") or recipe["model"].get("from_run")
    told = [f"guidance `{teacher['guidance']}`"] if teacher else []
    if teacher.get("run"):
        told.insert(0, _named(teacher["run"]))
    objective = yaml.safe_dump(_set(recipe["objective"]), default_flow_style=True, width=10**6)
    return {
        "objective": objective.strip(),
        "teacher": ", ".join(told),
        "start": _named(start) if start else "random weights",
        "parameters": f"{sum(p.numel() for p in model.backbone.parameters()):,}",
        "compute": _compute(run),
        "software": ", ".join(f"{name} {versions[name]}" for name in ("driftmap", "torch", "diffusers")),
    }


def _named(place: str) -> str:
    """Return what a run or a checkpoint is called: an id of the Hub, or the name of a folder here."""
    return f"`{Path(place).name if Path(place).exists() else place}`"


def _compute(run: Path) -> str:
    """Tell how long a run has trained, from the rates that it logged, on how many processes."""
    log, _ = read_log(run / "log.jsonl")
    seconds, before, processes = 0.0, 0, 1
    for row in log:
        if rate := row.get("images_per_s"):
            seconds += (row["samples"] - before) / rate
            processes = max(processes, round(rate / row.get("images_per_s_per_process", rate)))
        before = row["samples"]
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    last = log[-1] if log else {"step": 0, "samples": 0}
    told = f"{last['step']:,} steps, {last['samples']:,} samples, {time}"
    return f"{told} on {processes} process{'es' * (processes > 1)}"


def _set(settings: Any) -> Any:
    """Return settings without those that are off."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: _set(value) for key, value in settings.items()}
    return {key: value for key, value in kept.items() if value not in (None, 0, {})}


def _sets(run: Path, shards: ShardSet) -> list[ShardSet]:
    """Return the data sets that a run was trained on."""
    mixture = run_recipe(run)["data"].get("mixture")
    return [ShardSet.open(part["shards"]) for part in mixture] if mixture else [shards]


def _about_data(shards: ShardSet) -> dict[str, Any]:
    return {
        "name": shards.info.get("name") or Path(str(shards.folder)).name,
        "num_samples": f"{shards.num_samples:,}",
        "licence": shards.licence,
        "source": shards.source,
        "fingerprint": shards.fingerprint,
    }
