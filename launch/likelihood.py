"""From a run folder to likelihood.json: what a model's data, path and network say about what to measure."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.batch import ordered
from ..data.decode import Pixels, find_decoder
from ..data.labels import CLASS
from ..data.shards import ShardSet, write_atomically
from ..models.bound import Variance
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap
from ..models.ode_likelihood import Adaptive, FixedSteps, Solver
from ..models.schedule import Discrete
from ..trainer.build import load_flow_map, run_recipe, settings_of_run, shards_of_run
from ..trainer.checkpoint import fingerprint
from ..trainer.config import ConfigError
from ..trainer.fit import check_data
from ..trainer.latents import Preparation
from ..trainer.likelihood import Bound, Denoising, FlowLikelihood, ImportanceWeightedBound, Probe
from ..trainer.measuring import Measure, measure
from ..trainer.objective import Batch
from ..trainer.progress import progress
from ..trainer.rate_distortion import chart, curve
from ..trainer.strategy import process_group
from ..trainer.world import World

PATHS = 64  # of the importance-weighted bound
STEPS = 1000  # of a chain along a path that has no steps of its own
EXACT_DIMENSIONS = 16  # up to which the divergence is an exact trace
FIRST_TIME = 1e-3  # of the flow of a network that predicts data, whose velocity is infinite at t = 0
PURPOSE = {  # the measures that an option is for
    "steps": ("bound", "iw"),
    "drawn_steps": ("bound",),
    "variance": ("bound", "iw"),
    "paths": ("iw",),
    "solver": ("ode",),
    "probe": ("ode",),
}


@dataclass(frozen=True)
class LikelihoodRequest:
    """What to measure: a run on data, by `measures` of bound, iw and ode; None is a default."""

    run: Path
    data: Path
    measures: tuple[str, ...] = ("bound", "ode")
    steps: int | None = None
    drawn_steps: int | None = None
    variance: Variance | None = None
    paths: int | None = None
    solver: str | None = None
    probe: Probe | None = None
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in ("bound", "iw", "ode")]
        if unknown or not self.measures:
            raise ConfigError(f"--measures {','.join(self.measures)}: expected some of bound, iw and ode")
        for option, measures in PURPOSE.items():
            if getattr(self, option) is not None and not set(measures) & set(self.measures):
                raise ConfigError(
                    f"--{option.replace('_', '-')} has no effect without the measure "
                    f"{' or '.join(measures)}; add it to --measures, or leave the option out"
                )
        if self.solver is not None:
            parse_solver(self.solver)


def likelihood_of_run(request: LikelihoodRequest, out: Path) -> dict[str, Any]:
    """Measure a run, write `out` (JSON) and OUT-rate-distortion.svg; every process must call."""
    world = World(process_group())
    model = load_flow_map(request.run).to(world.device)
    label = run_recipe(request.run)["data"].get("label", CLASS)
    shards = ShardSet.open(request.data).labelled_by(label)
    check_data(model, settings_of_run(request.run), shards, name=f"the model of {request.run}")
    pixels = isinstance(find_decoder(shards), Pixels)
    measures = _measures(request, model, pixels=pixels)
    about = {
        "data": shards.fingerprint,
        "space": space_of(request.run, shards),
        "condition": None if model.null_condition is None else label,
        "seed": request.seed,
    }
    batches = _batches(request, shards, world)
    found = measure(measures, batches, world, about=about)
    result = {"run": str(request.run), "fingerprint": fingerprint(model), **found}
    world.first(lambda: _write(result, out, name=request.run.name))
    return result


def _measures(request: LikelihoodRequest, model: FlowMap, *, pixels: bool) -> list[Measure]:
    """Return what to measure, with everything left open chosen by the model."""
    measures: list[Measure] = []
    own = model.path.num_steps if isinstance(model.path, Discrete) else None
    steps = request.steps or own or STEPS
    if own is not None and steps > own:
        raise ConfigError(f"--steps {steps}: the path of {request.run} has only {own} steps of its own")
    if request.drawn_steps is not None and request.drawn_steps >= steps:
        raise ConfigError(
            f"--drawn-steps {request.drawn_steps} of a chain of {steps} steps; leave it out to compute all"
        )
    # Each is right for the limit that its data are nearer to: known values, and a Gaussian (Ho et al., 3.2).
    variance = request.variance or ("fixed_small" if pixels else "fixed_large")
    denoising = Denoising(model, steps, variance=variance, pixels=pixels)
    if "bound" in request.measures:
        measures.append(Bound(denoising, request.drawn_steps))
    if "iw" in request.measures:
        measures.append(ImportanceWeightedBound(denoising, request.paths or PATHS))
    if "ode" in request.measures:
        few = math.prod(model.sample_shape) <= EXACT_DIMENSIONS
        probe: Probe = request.probe or ("exact" if few else "rademacher")
        first = model.path.on_grid(torch.zeros(1, dtype=torch.float64)).item()
        if isinstance(model, Denoiser) and model.prediction == "data":
            first = max(first, FIRST_TIME)
        solver = parse_solver(request.solver or "dopri5:1e-5")
        measures.append(FlowLikelihood(model, solver, probe, interval=(first, 1.0), pixels=pixels))
    return measures


def parse_solver(text: str) -> Solver:
    """Return the solver of a text such as heun:100, rk4:50 or dopri5:1e-5."""
    found = re.fullmatch(r"(heun|rk4):([1-9]\d*)|dopri5:(\d*\.?\d+(?:e-?\d+)?)", text)
    if found and found[1]:
        return FixedSteps("heun" if found[1] == "heun" else "rk4", int(found[2]))
    if found and float(found[3]) > 0:
        return Adaptive(float(found[3]))
    raise ConfigError(
        f"--solver {text}: expected heun or rk4 with a number of steps, or dopri5 with a tolerance, such as "
        "heun:100, rk4:50 or dopri5:1e-5"
    )


def _batches(request: LikelihoodRequest, shards: ShardSet, world: World) -> Iterator[Batch]:
    """Yield this process's batches of the whole data set, latents at the scale of the run's own."""
    prepare = preparation_of(request.run, shards, seed=request.seed, device=world.device)
    mine = ordered(shards, request.batch_size, rank=world.rank, world=world.size)
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
        return "pixels" if isinstance(find_decoder(shards), Pixels) else "points"
    trained = shards_of_run(run)
    if trained.info.get("encoder") != shards.info["encoder"]:
        raise ConfigError(
            f"{run} was trained on latents of the autoencoder {trained.info.get('encoder')}, but "
            f"{shards.folder} holds those of {shards.info['encoder']}; encode the pictures by the first one"
        )
    scale, shift = (trained.info["latents"][name] for name in ("scaling_factor", "shift_factor"))
    return f"latents (z - {shift:.6g}) * {scale:.6g} of the autoencoder {shards.info['encoder']}"


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
    for name in ("N", "K", "dequantisation"):
        table.add_row(name, *(str(row[name] or "-").split(":")[0] for row in rows.values()))
    console.print(table)
