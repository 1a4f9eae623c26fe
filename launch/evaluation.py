"""From run folders to tables and grids: finds the autoencoder, the teacher and the features of a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.shards import ShardSet, write_atomically
from ..models.autoencoder import decode_latents
from ..models.backbones.convnet import ConvNet
from ..models.flow_map import FlowMap
from ..models.sampler import euler, jump, time_grid
from ..trainer.build import guided, load_model, run_recipe, shards_of_run
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of
from ..trainer.evaluate import Judge, evaluate, pictures_of, sample_noise
from ..trainer.report import grid

GRID_PICTURES, GRID_COLUMNS = 40, 10
COLUMNS = {
    "model": "model",
    "nfe": "nfe",
    "Fréchet": "frechet",
    "ratio": "ratio",
    "end point": "endpoint_error",
    "accuracy": "class_accuracy",
    "s/sample": "seconds_per_sample",
}  # of the printed table; evaluation.json has more


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: a flow-map run, the run of a classifier to see with, held-out pictures.

    `teacher` is the run to compare with; by default the one that taught, else the run's own diagonal.
    """

    run: Path
    features: Path
    held_out: Path
    teacher: Path | None = None
    nfe: tuple[int, ...] = (1, 2, 4, 8)
    many: int = 32
    num_samples: int = 1000
    seed: int = 0


def evaluate_run(request: EvaluationRequest, out: Path) -> dict[str, Any]:
    """Evaluate a run, write `out` (JSON) and RUN/samples/*.png, and return the evaluation."""
    recipe = run_recipe(request.run)
    student = _flow_map(request.run)
    taught = recipe.get("teacher") or {}
    teacher_run = request.teacher or (Path(taught["run"]) if taught else request.run)
    guidance = taught.get("guidance", 1.0)
    teacher = guided(_flow_map(teacher_run), guidance)
    latents = shards_of_run(request.run)
    judge = _judge(request, latents)
    noise = sample_noise(len(judge.held_out), student.sample_shape, seed=request.seed)
    evaluation, pictures = evaluate(
        judge, teacher, student, noise=noise, nfe=list(request.nfe), many=request.many
    )
    evaluation |= {
        "seed": request.seed,
        "guidance": guidance,
        "reference": ShardSet.open(request.held_out).fingerprint,
    }
    pictures |= {"held-out": judge.held_out, "reconstructions": judge.reconstructions()}
    for name, batch in pictures.items():
        write_grid(request.run / "samples" / f"{name}.png", batch[:GRID_PICTURES])
    write_atomically(out, json.dumps(evaluation, indent=1).encode())
    return evaluation


def sample_run(
    run: Path, out: Path, *, nfe: int, count: int, label: int | None, guidance: float, seed: int
) -> None:
    """Sample a run into a grid: jumps where a flow map was trained, else Euler steps of the velocity."""
    recipe = run_recipe(run)
    model = _flow_map(run)
    noise = sample_noise(count, model.sample_shape, seed=seed)
    num_classes = model.null_condition
    if label is not None and not 0 <= label < (num_classes or 0):
        raise ConfigError(f"--label {label}: {run} has {num_classes or 0} classes, counted from 0")
    labels = None
    if num_classes:
        labels = torch.arange(count) % num_classes if label is None else torch.full((count,), label)
    if recipe["objective"]["name"] == "flow_matching" or guidance != 1:
        velocity = guided(model, guidance)
        cost = getattr(velocity, "evaluations", 1)
        if nfe % cost:
            raise ConfigError(
                f"--nfe {nfe}: guidance takes {cost} evaluations a step; give a multiple of {cost}"
            )
        samples = euler(velocity, noise, grid=time_grid(nfe // cost), condition=labels)
    else:
        samples = jump(model, noise, grid=time_grid(nfe), condition=labels)
    shards = shards_of_run(run)
    if "latents" in shards.info:
        samples = decode_latents(autoencoder_of(shards), samples)
    write_grid(out, samples.clamp(-1, 1))


def parse_nfe(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "1,2,4,8"."""
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = (0,)
    if numbers[0] < 1:
        raise ConfigError(f"--nfe {text}: expected whole numbers from 1, such as 1,2,4,8")
    return numbers


def write_grid(file: Path, pictures: torch.Tensor) -> None:
    """Write pictures (N, C, H, W) in [-1, 1] as one PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, grid(((pictures + 1) * 127.5).round().byte(), GRID_COLUMNS))


def print_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Print the table, its floor, and whether the metric sees."""
    table = Table(title=f"Fréchet distance on {evaluation['features']}, {evaluation['num_samples']} samples")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in evaluation["rows"]:
        cells = (row[name] for name in COLUMNS.values())
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)
    floor = evaluation["floor"]
    console.print(
        f"floor: training split against held-out {floor['self']:.3f}, "
        f"held-out against their reconstructions {floor['reconstruction']:.3f}"
    )
    if not evaluation["sees"]:
        console.print(
            "BLIND: this metric does not tell the teacher's one step from its many; ratios mean nothing"
        )


def _judge(request: EvaluationRequest, latents: ShardSet) -> Judge:
    probe = load_model(request.features)
    if not isinstance(probe, ConvNet):
        raise ConfigError(
            f"{request.features} is no run of a classifier; train one with objective: {{name: classifier}}"
        )
    held_out = ShardSet.open(request.held_out)
    training = shards_of_run(request.features)
    count = min(request.num_samples, held_out.num_samples, training.num_samples)
    pictures, labels = pictures_of(held_out, count)
    trained_on = training.info.get("name", training.folder)
    name = f"{probe.num_features} convolutional features of a classifier trained on {trained_on}"
    return Judge(autoencoder_of(latents), probe, pictures, labels, pictures_of(training, count)[0], name)


def _flow_map(run: Path) -> FlowMap:
    model = load_model(run)
    if not isinstance(model, FlowMap):
        raise ConfigError(
            f"{run} holds no flow map or velocity network; give a run of a generative objective"
        )
    return model
