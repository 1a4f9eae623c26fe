"""From run folders to tables and grids: finds the autoencoder, the teacher and the features of a run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table

from ..data.labels import CAPTION, CLASS
from ..data.shards import ShardSet, write_atomically
from ..models.condition import Condition, Text, padded
from ..models.flow_map import FlowMap
from ..trainer.build import load_flow_map, run_recipe, shards_of_run
from ..trainer.checkpoint import fingerprint
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of, text_encoder_of
from ..trainer.evaluate import Subject, evaluate
from ..trainer.features import CaptionJudge, classifier_of, features_named
from ..trainer.guiding import guided, usual_sampler
from ..trainer.judge import Judge
from ..trainer.references import MADE, Dealer, Part, References, default_folder, makers, pictures_behind
from ..trainer.report import grid
from ..trainer.signals import asked_to_stop
from ..trainer.strategy import process_group
from ..trainer.unfinished import Unfinished
from ..trainer.world import World

GRID_PICTURES, GRID_COLUMNS = 40, 10
QUALITY = {
    "Fréchet": "frechet",
    "ratio": "ratio",
    "end point": "endpoint_error",
    "accuracy": "class_accuracy",
    "s/sample": "seconds_per_sample",
}
OTHERS = {
    "kernel": "kernel",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "caption": "caption_alignment",
    "shuffled": "caption_alignment_shuffled",
}  # of the printed tables; evaluation.json has more


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: a flow-map run, features to see with (features.py), held-out pictures.

    `teacher` is the run to compare with; by default the one that taught, else the run's own diagonal.
    `training` are pictures that it was trained on, by default those of the autoencoder or of the features'
    classifier; `probe` is the run of a classifier that knows the classes, by default that of the features.
    """

    run: Path
    features: str
    held_out: Path
    teacher: Path | None = None
    nfe: tuple[int, ...] = (1, 2, 4, 8)
    many: int = 32
    num_samples: int = 1000
    seed: int = 0
    training: Path | None = None
    probe: Path | None = None
    captions: str | None = None  # where a CLIP is, for caption alignment
    batch_size: int = 250
    references: Path | None = None  # folder of what is measured once
    shift: float = 1.0  # of the grid of the student's jumps
    guidance: float | None = None  # of a student that takes it as an input, and of its teacher


def evaluate_run(request: EvaluationRequest, out: Path) -> dict[str, Any]:
    """Evaluate a run, write `out` (JSON) and RUN/samples/*.png, and return the evaluation.

    Started in several processes, they share the samples, and the first one writes. Raises Stopped where one
    was asked to stop; what was done is kept then, and taken over by the next call.
    """
    world = World(process_group())
    recipe = run_recipe(request.run)
    student = load_flow_map(request.run).to(world.device)
    latents = shards_of_run(request.run)
    taught = recipe.get("teacher") or latents.info.get("trajectories", {}).get("teacher") or {}
    teacher_run = request.teacher or (Path(taught["run"]) if taught else request.run)
    student, guidance = _at_guidance(student, request, taught.get("guidance", 1.0))
    taught = taught if guidance != 1 else {}  # without guidance nothing is rescaled
    interval = tuple(taught.get("guidance_interval", (0.0, 1.0)))
    rescale = taught.get("guidance_rescale", 0.0)
    weak = load_flow_map(Path(taught["weak"])).to(world.device) if taught.get("weak") else None
    unguided = load_flow_map(teacher_run).to(world.device)
    teacher = guided(unguided, guidance, interval=interval, rescale=rescale, weak=weak)
    autoencoder = autoencoder_of(latents) if "latents" in latents.info else None
    # A caption tells the class, too.
    label = CLASS if latents.label == CAPTION else latents.label
    held_out = _part(ShardSet.open(request.held_out).labelled_by(label), request)
    training = _part(_training(request, latents).labelled_by(label), request)
    subject = Subject(
        teacher=teacher,
        student=student,
        condition=_conditions(student, latents, held_out, world.device),
        nfe=list(request.nfe),
        many=request.many,
        num_samples=request.num_samples,
        seed=request.seed,
        jumps=usual_sampler(recipe["objective"]["name"], guidance=1.0) == "jump",
        shift=request.shift,
    )
    with asked_to_stop() as world.stop:
        dealer = Dealer(world, request.batch_size)
        conditional = student.null_condition is not None
        references = _references(request, held_out, autoencoder, dealer, conditional=conditional)
        about = asdict(replace(request, references=None))
        about |= {"weights": [fingerprint(each) for each in (student, unguided, weak) if each is not None]}
        about |= {"seen": [references.about(part) for part in (held_out, training)]}
        unfinished = Unfinished(out, about, world)
        evaluation, pictures = evaluate(
            subject, references, held_out=held_out, training=training, unfinished=unfinished
        )
    evaluation |= {"guidance": guidance, "guidance_interval": interval, "guidance_rescale": rescale}
    world.first(lambda: _write(request.run, out, evaluation, pictures))
    unfinished.forget()
    return evaluation


def _at_guidance(student: FlowMap, request: EvaluationRequest, taught: Any) -> tuple[FlowMap, float]:
    """Return the student at the guidance of the evaluation, and this: as it was taught, or as it is asked."""
    if not student.takes_guidance:
        if request.guidance is not None:
            raise ConfigError(
                f"--guidance {request.guidance:g}: {request.run} takes no scale of guidance; leave it out, "
                "its teacher's is what it was"
            )
        return student, taught
    asked = 1.0 if request.guidance is None else request.guidance
    guided(student, asked)  # refuses what it does not take
    return student.at_guidance(asked), asked


def _write(run: Path, out: Path, evaluation: dict[str, Any], pictures: dict[str, torch.Tensor]) -> None:
    for name, batch in pictures.items():
        write_grid(run / "samples" / f"{name}.png", batch[:GRID_PICTURES])
    write_atomically(out, json.dumps(evaluation, indent=1).encode())


def parse_nfe(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "1,2,4,8"."""
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = (0,)
    if numbers[0] < 1:
        raise ConfigError(f"--nfe {text}: expected whole numbers from 1, such as 1,2,4,8")
    return numbers


def write_grid(file: Path, pictures: torch.Tensor, *, columns: int = GRID_COLUMNS) -> None:
    """Write pictures (N, C, H, W) in [-1, 1] as one PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, grid(((pictures + 1) * 127.5).round().byte(), columns))


def print_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Print the tables, their floors, and which metrics are blind."""
    title = f"Fréchet distance on {evaluation['features']}, {evaluation['num_samples']} samples"
    _print_table(evaluation, QUALITY, title, console)
    floor = evaluation["floor"]
    told = f"floor: training split against held-out {floor['self']['frechet']:.3f}"
    if "reconstruction" in floor:
        told += f", held-out against their reconstructions {floor['reconstruction']['frechet']:.3f}"
    console.print(told)
    about = [f"features {evaluation['features_hash']}", f"reference {evaluation['reference'][:16]}"]
    about += [f"autoencoder {evaluation['autoencoder']}"] if evaluation["autoencoder"] else []
    about += [f"{evaluation['num_references']} reference pictures", f"guidance {evaluation['guidance']}"]
    console.print(", ".join([*about, f"seed {evaluation['seed']}"]))
    title = f"Other metrics, {evaluation['num_compared']} samples, {evaluation['neighbours']} neighbours"
    _print_table(evaluation, OTHERS, title, console, floors=True)
    names = {key: heading for heading, key in {**QUALITY, **OTHERS}.items()}
    for nfe, found in evaluation.get("jumps", {}).get("grids", {}).items():
        times = ", ".join(f"{time:.3g}" for time in found["grid"])
        console.print(
            f"in {nfe} steps the best grid is {times} (--shift {found['shift']:.3g}): end-point error "
            f"{found['error']:.3g}, of the even grid {found['even_error']:.3g}",
            soft_wrap=True,
        )
    if evaluation["blind"]:
        blind = ", ".join(names[name] for name in evaluation["blind"])
        console.print(
            f"BLIND: {blind}; they do not tell the teacher's one step from its many, and say nothing"
        )


def _print_table(
    evaluation: dict[str, Any], columns: dict[str, str], title: str, console: Console, *, floors: bool = False
) -> None:
    """Print the columns that the evaluation has, and mark the blind ones."""
    columns = {heading: name for heading, name in columns.items() if name in evaluation["rows"][0]}
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    table.add_column("nfe", justify="right")
    for heading, name in columns.items():
        table.add_column(f"{heading} (blind)" if name in evaluation["blind"] else heading, justify="right")
    rows = [(row["model"], str(row["nfe"]), row) for row in evaluation["rows"]]
    floor = [(name, "floor", values) for name, values in evaluation["floor"].items()] if floors else []
    for model, nfe, row in rows + floor:
        cells = ("–" if row.get(name) is None else f"{row[name]:.3g}" for name in columns.values())
        table.add_row(model, nfe, *cells)
    console.print(table)


def _part(shards: ShardSet, request: EvaluationRequest) -> Part:
    return Part(shards, min(request.num_samples, shards.num_samples))


def _training(request: EvaluationRequest, latents: ShardSet) -> ShardSet:
    """Return pictures that the model was trained on: its own, or those that its latents are of."""
    if request.training is not None:
        return ShardSet.open(request.training)
    if not MADE & latents.info.keys():
        return latents
    runs = [*makers(latents), Path(request.features)]
    if (pictures := pictures_behind(latents, runs)) is not None:
        return pictures
    raise ConfigError(
        f"{latents.folder} does not say where its pictures are; give them by --training, for the floor"
    )


def _references(
    request: EvaluationRequest,
    held_out: Part,
    autoencoder: AutoencoderKL | None,
    dealer: Dealer,
    *,
    conditional: bool,
) -> References:
    """Return what judges, and what it is to judge; no classes of samples that were asked for none."""
    device = dealer.world.device
    features = features_named(request.features, device=device)
    probe = _probe(request, held_out.shards.label)
    judge = Judge(
        features,
        classifier_of(probe).to(device) if probe and conditional and held_out.shards.label_numbers else None,
        CaptionJudge.of(request.captions, device=device) if request.captions else None,
    )
    folder = request.references or default_folder()
    made_by = None if autoencoder is None else fingerprint(autoencoder)
    autoencoder = None if autoencoder is None else autoencoder.to(device)  # pyright: ignore
    return References(judge, dealer, folder, autoencoder, made_by)


def _probe(request: EvaluationRequest, label: str) -> Path | None:
    """Return the classifier that tells what samples of a label have to show, if there is one."""
    run = request.probe or (Path(request.features) if Path(request.features).is_dir() else None)
    if run is None or label == (known := run_recipe(run)["data"].get("label", CLASS)):
        return run
    if request.probe:
        raise ConfigError(
            f"--probe {run}: it tells {known!r}, but samples of {request.run} are to show {label!r}; train a "
            f"classifier with data.label={label}"
        )
    return None


def _conditions(
    model: FlowMap, latents: ShardSet, held_out: Part, device: torch.device
) -> Callable[[np.ndarray], Condition | None]:
    """Return what gives samples the captions or classes of the held-out pictures, which go round."""
    if model.text_width:
        encoder = text_encoder_of(latents)
        encoder.model.to(device)

        def captions(numbers: np.ndarray) -> Condition:
            # To half precision, as the captions of the data are stored.
            encoded = padded([tokens.half().float() for tokens in encoder(held_out.captions(numbers))])
            return Text(encoded.tokens.to(device), encoded.mask.to(device))

        return captions

    def labels(numbers: np.ndarray) -> Condition | None:
        found = None if model.null_condition is None else held_out.labels(numbers)
        return None if found is None else found.to(device)

    return labels
