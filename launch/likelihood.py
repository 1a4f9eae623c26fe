"""From a run folder to likelihood.json: what a model's data, path and network say about what to measure."""

import json
from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.batch import ordered
from ..data.decode import Pixels, find_decoder
from ..data.labels import CLASS
from ..data.shards import ShardSet, write_atomically
from ..data.tabular import KEY, Standard
from ..models.backbones.coupling_flow import CouplingFlow
from ..models.flow_map import FlowMap
from ..trainer.build import load_flow_map, load_model, run_recipe, settings_of_run, shards_of_run
from ..trainer.checkpoint import fingerprint
from ..trainer.config import ConfigError
from ..trainer.fit import check_data
from ..trainer.latents import Preparation
from ..trainer.likelihood import Bound
from ..trainer.measuring import measure
from ..trainer.objective import Batch
from ..trainer.progress import progress
from ..trainer.rate_distortion import chart, curve
from ..trainer.signals import asked_to_stop
from ..trainer.strategy import process_group
from ..trainer.unfinished import Unfinished
from ..trainer.world import World
from .likelihood_request import LikelihoodRequest, measures_of


def likelihood_of_run(request: LikelihoodRequest, out: Path) -> dict[str, Any]:
    """Measure a run, write `out` (JSON) and OUT-rate-distortion.svg; every process must call."""
    world = World(process_group())
    model = _model_of(request.run).to(world.device)
    label = run_recipe(request.run)["data"].get("label", CLASS)
    shards = ShardSet.open(request.data).labelled_by(label)
    check_data(model, settings_of_run(request.run), shards, name=f"the model of {request.run}")
    pixels = isinstance(find_decoder(shards), Pixels)
    request = request.of(model)
    measures = measures_of(request, model, pixels=pixels)
    about = {
        "data": shards.fingerprint,
        "space": space_of(request.run, shards),
        "condition": None if model.null_condition is None else label,
        "seed": request.seed,
    }
    made_by = {"run": str(request.run), "fingerprint": fingerprint(model)}
    settings = {one.key: one.settings() for one in measures}
    unfinished = Unfinished(out, {**made_by, **about, **settings, "batch_size": request.batch_size}, world)
    with asked_to_stop() as world.stop:
        found = measure(measures, partial(_batches, request, shards, world), unfinished, about=about)
    if (standard := Standard.of(shards.info)) is not None:
        for row in found.values():
            row["nats_in_units"] = row["nats"] + standard.log_scale
    result = {**made_by, **found}
    world.first(lambda: _write(result, out, name=request.run.name))
    unfinished.forget()
    return result


def _model_of(run: Path) -> FlowMap | CouplingFlow:
    """Return the model of a run that has a likelihood."""
    model = load_model(run)
    return model if isinstance(model, CouplingFlow) else load_flow_map(run)


def _batches(
    request: LikelihoodRequest, shards: ShardSet, world: World, done: Container[int]
) -> Iterator[Batch]:
    """Yield this process's batches of what is not done, latents at the scale of the run's own."""
    prepare = preparation_of(request.run, shards, seed=request.seed, device=world.device)
    mine = ordered(shards, request.batch_size, rank=world.rank, world=world.size, done=done)
    with progress("likelihood", shards.num_samples, unit="samples", shown=world.rank == 0) as show:
        for samples in mine:
            yield prepare(samples)
            others = (world.size - 1) * request.batch_size
            show(min(int(samples["index"][-1]) + 1 + others, shards.num_samples))


def preparation_of(run: Path, shards: ShardSet, *, seed: int, device: torch.device) -> Preparation:
    """Return what prepares samples for a run's model: latents come at the scale of the run's own."""
    info = shards_of_run(run).info if "latents" in shards.info else shards.info
    return Preparation.of(info, seed=seed, device=device)


def space_of(run: Path, shards: ShardSet) -> str:
    """Return what the numbers are about; ConfigError for latents of another autoencoder."""
    if "latents" not in shards.info:
        return "pixels" if isinstance(find_decoder(shards), Pixels) else _points_of(run, shards)
    trained = shards_of_run(run)
    if trained.info.get("encoder") != shards.info["encoder"]:
        raise ConfigError(
            f"{run} was trained on latents of the autoencoder {trained.info.get('encoder')}, but "
            f"{shards.folder} holds those of {shards.info['encoder']}; encode the pictures by the first one"
        )
    scale, shift = (trained.info["latents"][name] for name in ("scaling_factor", "shift_factor"))
    return f"latents (z - {shift:.6g}) * {scale:.6g} of the autoencoder {shards.info['encoder']}"


def _points_of(run: Path, shards: ShardSet) -> str:
    """Return what points are; ConfigError for a table that is standardised otherwise than the run's."""
    if shards.info.get(KEY) != shards_of_run(run).info.get(KEY):
        raise ConfigError(
            f"{shards.folder} is standardised otherwise than the data of {run}; make both parts of a table "
            "by one `driftmap shards make --held-out`"
        )
    return "points" if KEY not in shards.info else "points: columns (x - mean) / std of the table"


def _write(result: dict[str, Any], out: Path, *, name: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(result, indent=1).encode())
    drawing = out.with_name(f"{out.stem}-rate-distortion.svg")
    drawing.unlink(missing_ok=True)  # may be of other numbers
    bound = result.get(Bound.key, {})
    if "by_step" in bound:
        write_atomically(drawing, chart({name: curve(bound)}))


def print_likelihood(result: dict[str, Any], console: Console) -> None:
    """Print each measure in a column of its own: a bound and a density are not to be compared."""
    rows = {key: row for key, row in result.items() if isinstance(row, dict)}
    table = Table(title=f"likelihood of {result['run']}")
    table.add_column("")
    for key in rows:
        table.add_column(key.removesuffix("_bits_per_dim"), justify="right")
    numbers = {"bits a dimension": "value", "standard error": "standard_error", "nats a sample": "nats"}
    for heading, name in {**numbers, "evaluations": "evaluations"}.items():
        table.add_row(heading, *(f"{row[name]:.5g}" for row in rows.values()))
    if any("nats_in_units" in row for row in rows.values()):
        table.add_row("nats in the table's units", *(f"{row['nats_in_units']:.5g}" for row in rows.values()))
    for name in ("N", "K", "dequantisation"):
        table.add_row(name, *(str(row[name] or "-").split(":")[0] for row in rows.values()))
    console.print(table)
