"""From a run and held-out data to inversion.json: noise of the data, and what is lost on the way back."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data.labels import CLASS
from ..data.shards import ShardSet, write_atomically
from ..models.autoencoder import decode_latents
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap
from ..models.samplers import euler, heun, jump
from ..trainer.build import load_flow_map, run_recipe, settings_of_run, shards_of_run
from ..trainer.checkpoint import fingerprint
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of
from ..trainer.fit import check_data
from ..trainer.guiding import usual_sampler
from ..trainer.inversion import measure_round_trips
from ..trainer.references import Part
from .evaluation import write_grid
from .likelihood import preparation_of, space_of

BOTH_WAYS = {"jump": (jump, 1), "euler": (euler, 1), "heun": (heun, 2)}  # and their evaluations a step


@dataclass(frozen=True)
class InversionRequest:
    """What to invert: a run on the first `num_samples` of `data`, by a sampler that goes both ways.

    `sampler` is by default euler where a run has learned no jumps, else jump; of a denoiser a jump is DDIM's
    step. `start` is the first time.
    """

    run: Path
    data: Path
    nfe: tuple[int, ...] = (1, 2, 4, 8)
    sampler: str | None = None
    start: float = 0.01
    num_samples: int = 256
    batch_size: int = 64
    seed: int = 0


def invert_run(request: InversionRequest, out: Path) -> dict[str, Any]:
    """Measure round trips of a run; write `out` (JSON) and pictures RUN/samples/round-trip-*.png."""
    model = load_flow_map(request.run)
    recipe = run_recipe(request.run)
    shards = ShardSet.open(request.data).labelled_by(recipe["data"].get("label", CLASS))
    check_data(model, settings_of_run(request.run), shards, name=f"the model of {request.run}")
    space = space_of(request.run, shards)
    name, sample, cost = _sampler(request, model, recipe["objective"]["name"])
    part = Part(shards, min(request.num_samples, shards.num_samples))
    prepare = preparation_of(request.run, shards, seed=request.seed, device=torch.device("cpu"))
    rows, pictures = [], _pictures(request.run, model, shards)
    for nfe in request.nfe:
        starts = range(0, part.size, request.batch_size)
        places = (np.arange(begin, min(begin + request.batch_size, part.size)) for begin in starts)
        batches = (prepare(part.batch(each)) for each in places)
        lost, shown = measure_round_trips(
            model, batches, sample, num_steps=nfe // cost, start=request.start, pictures=pictures
        )
        rows.append({"nfe": nfe} | lost)
        if shown is not None:
            file = request.run / "samples" / f"round-trip-{nfe:03d}.png"
            write_grid(file, shown.flatten(0, 1), columns=shown.shape[1])
    told = {"run": str(request.run), "fingerprint": fingerprint(model), "data": shards.fingerprint}
    told |= {"space": space, "sampler": name, "start": request.start, "num_samples": part.size}
    result = told | {"seed": request.seed, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(result, indent=1).encode())
    return result


def _sampler(
    request: InversionRequest, model: FlowMap, objective: str
) -> tuple[str, Callable[..., Tensor], int]:
    """Return the name of a sampler, itself, and its evaluations a step."""
    name = request.sampler or ("euler" if usual_sampler(objective, guidance=1.0) == "euler" else "jump")
    if name not in BOTH_WAYS:
        raise ConfigError(
            f"--sampler {name} goes only from noise to data; there are {', '.join(BOTH_WAYS)} for both ways"
        )
    if name == "heun" and isinstance(model, Denoiser):
        raise ConfigError(
            f"--sampler heun asks {request.run} for its velocity at t = 0, which a denoiser does not learn; "
            "take jump"
        )
    sample, cost = BOTH_WAYS[name]
    if wrong := [nfe for nfe in request.nfe if nfe % cost]:
        raise ConfigError(
            f"--nfe {wrong[0]}: a step of {name} takes {cost} evaluations; give multiples of {cost}"
        )
    if not 0 < request.start < 1:
        raise ConfigError(f"--start {request.start:g}: expected a time above 0 (data) and below 1 (noise)")
    return name, sample, cost


def _pictures(run: Path, model: FlowMap, shards: ShardSet) -> Callable[[Tensor], Tensor] | None:
    """Return what makes pictures of samples, None where they are none."""
    if len(model.sample_shape) != 3:
        return None
    if "latents" not in shards.info:
        return lambda samples: samples
    return partial(decode_latents, autoencoder_of(shards_of_run(run)))


def print_inversion(result: dict[str, Any], console: Console) -> None:
    """Print what is lost by number of evaluations."""
    title = f"data to noise and back by {result['sampler']} from t = {result['start']:g}"
    table = Table(title=f"{title}, {result['num_samples']} samples of {result['run']}")
    columns = {
        "nfe each way": "nfe",
        "round trip": "round_trip_error",
        "data": "data_error",
        "PSNR, dB": "psnr",
        "noise mean": "noise_mean",
        "noise std": "noise_std",
    }
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = (row[key] for key in columns.values())
        table.add_row(*("–" if value is None else f"{value:.4g}" for value in cells))
    console.print(table)
