"""Quality against number of network evaluations, held to the floor that the autoencoder and the sample set.

A table says what its features are, how many pictures it compares and what it can see at all:
    self             as many of the training split as held-out pictures: what chance alone gives
    reconstruction   reconstructions of the held-out pictures: what the autoencoder alone loses
A metric that does not tell the teacher's single step from its many steps is blind, and is said to be.

Pictures pass batch by batch through all samplers and are forgotten; processes share the batches, and what a
batch holds does not depend on their number.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.autoencoder import decode_latents
from ..models.condition import Condition
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap, Velocity
from ..models.samplers import ddim, dpm_solver, euler, heun, jump, time_grid
from .agreement import agreement, best_shift
from .config import ConfigError
from .judge import MOST_KEPT, Meter, Seen
from .metrics.blindness import blind_metrics
from .metrics.frechet import frechet_distance
from .metrics.neighbours import NEIGHBOURS
from .references import Part, References, key_of, reconstruct
from .seeds import Random
from .unfinished import Unfinished
from .world import World

Sampler = Callable[[Tensor, Condition | None], Tensor]  # (noise, condition) -> latents
SHOWN = 40  # pictures of a grid
AGREEING = 64  # samples by which jumps are compared with each other
FEW = 4  # steps up to which the best shift of the grid is searched


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a teacher and a student from the same noise and the same conditions.

    `condition` gives the conditions of samples by their numbers. A run that has learned no `jumps` is only a
    teacher.
    """

    teacher: Velocity
    student: FlowMap
    condition: Callable[[np.ndarray], Condition | None]
    nfe: list[int]
    many: int
    num_samples: int
    seed: int
    jumps: bool = True
    shift: float = 1.0  # of the grid of the student's jumps


@dataclass
class Row:
    """One model at one number of evaluations, and what was measured of it so far, on this process."""

    model: str
    sampler: str
    nfe: int
    sample: Sampler
    meter: Meter
    squares: float = 0.0  # of the distances to the end points of the first row
    seconds: float = 0.0
    shown: Tensor | None = None  # the first pictures, on the process that made them

    def state(self) -> dict[str, Any]:
        """Return what was measured so far."""
        told = {"squares": self.squares, "seconds": self.seconds, "shown": self.shown}
        return told | {"meter": self.meter.state()}

    def add(self, state: dict[str, Any]) -> None:
        """Add what another process had measured."""
        self.meter.add(state["meter"])
        self.squares += state["squares"]
        self.seconds += state["seconds"]
        self.shown = state["shown"] if self.shown is None else self.shown


def samplers(
    teacher: Velocity,
    student: FlowMap,
    nfe: list[int],
    many: int,
    *,
    jumps: bool = True,
    shift: float = 1.0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, str, int, Sampler]]:
    """Yield (model, sampler, nfe, function) of every row: first the teacher at `many`, then each nfe.

    A guided teacher costs two evaluations a velocity; a row whose nfe it cannot meet exactly is left out. Its
    single step is always there: by it metrics show that they see. A denoiser takes its own steps, and not
    Heun's, which end in its velocity at t = 0, where DDPM trains no network.
    """
    cost = getattr(teacher, "evaluations", 1)
    fine, coarse, of_fine = heun, euler, 2
    if isinstance(student, Denoiser):
        fine, coarse, of_fine = partial(dpm_solver, path=student.path), partial(ddim, path=student.path), 1
    yield "teacher", _name(fine), many, _bound(fine, teacher, many // (of_fine * cost), device)
    for count in sorted({cost, *nfe}):
        if count % cost == 0:
            yield "teacher", _name(coarse), count, _bound(coarse, teacher, count // cost, device)
    for count in nfe if jumps else ():
        yield "student", "jump", count, _bound(jump, student, count, device, shift=shift)


def _name(sampler: Any) -> str:
    return getattr(sampler, "func", sampler).__name__


def _bound(
    sampler: Callable[..., Tensor],
    model: Any,
    num_steps: int,
    device: torch.device | str,
    *,
    shift: float = 1.0,
) -> Sampler:
    grid = time_grid(num_steps, shift=shift, device=device)
    return lambda noise, condition: sampler(model, noise, grid=grid, condition=condition)


def evaluate(
    subject: Subject, references: References, *, held_out: Part, training: Part, unfinished: Unfinished
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the evaluation as JSON-ready values, and the first pictures of every row by its name.

    Every process must call; all get the evaluation, the first one gets the pictures.
    """
    judge, world = references.judge, references.dealer.world
    real, other = references.seen(held_out), references.seen(training)
    restored = references.seen(held_out, reconstructed=True) if references.autoencoder else None
    named = samplers(
        subject.teacher,
        subject.student,
        subject.nfe,
        subject.many,
        jumps=subject.jumps,
        shift=subject.shift,
        device=world.device,
    )
    rows = [Row(*each, Meter(judge, subject.num_samples)) for each in named]

    def take(states: list[dict[str, Any]]) -> None:
        for row, state in zip(rows, states, strict=True):
            row.add(state)

    dealt = partial(references.dealer, subject.num_samples)
    for numbers in unfinished.resumed(dealt, take=take, state=lambda: [row.state() for row in rows]):
        _sample(subject, references, held_out, numbers, rows)
    floor = {"self": other} | ({"reconstruction": restored} if restored else {})
    table = _table(subject, rows, real, floor, world)
    told = {
        "features": judge.features.name,
        "features_hash": judge.features.hash,
        "judge": judge.hash,
        "num_samples": subject.num_samples,
        "num_references": held_out.size,
        "many_nfe": subject.many,
        "seed": subject.seed,
        "autoencoder": references.autoencoder_hash,
        "reference": held_out.shards.fingerprint,
        "reference_statistics": key_of(references.about(held_out)),
    }
    if subject.jumps:
        told |= {"shift": subject.shift}
        told |= {"jumps": world.first(lambda: _jumps(subject, rows[0].sample, world.device))}
    return told | table, _shown(rows, references, held_out) if world.rank == 0 else {}


def _jumps(subject: Subject, teacher: Sampler, device: torch.device) -> dict[str, Any]:
    """Return how far the student's jumps agree, and the best grids of few, by samples of no row."""
    random, shape = Random(subject.seed, torch.arange(AGREEING, device=device)), subject.student.sample_shape
    noise, other = (random.normal(purpose, shape) for purpose in ("agreement", "agreement states"))
    condition = subject.condition(np.arange(AGREEING))
    data = teacher(noise, condition)
    grids = {
        str(nfe): best_shift(subject.student, noise, data, nfe, condition)
        for nfe in subject.nfe
        if 2 <= nfe <= FEW
    }
    told = agreement(subject.student, data, other, condition)
    return {"num_samples": AGREEING, **told, "grids": grids}


def _sample(
    subject: Subject, references: References, held_out: Part, numbers: np.ndarray, rows: list[Row]
) -> None:
    """Sample these numbers by every row, and show the pictures to its meter."""
    device = references.dealer.world.device
    index = torch.from_numpy(numbers).to(device)
    noise = noise_of(index, subject.student.sample_shape, seed=subject.seed)
    condition = subject.condition(numbers)
    prompts = held_out.prompts(numbers, references.judge, device)
    ends = None
    for row in rows:
        began = time.perf_counter()
        latents = row.sample(noise, condition)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row.seconds += time.perf_counter() - began
        ends = latents if ends is None else ends
        row.squares += (latents - ends).double().square().flatten(1).mean(1).sum().item()
        pictures = latents.clamp(-1, 1)
        if references.autoencoder is not None:
            pictures = decode_latents(references.autoencoder, latents)
        _check_size(pictures, held_out)
        row.meter.update(pictures, numbers, prompts)
        if numbers[0] == 0:
            row.shown = pictures[:SHOWN].cpu()


def _table(
    subject: Subject, rows: list[Row], real: Seen, floor: dict[str, Seen], world: World
) -> dict[str, Any]:
    """Return rows, floors, and the names of blind metrics; every process must call."""
    totals = world.total(torch.tensor([[row.squares, row.seconds] for row in rows], dtype=torch.float64))
    values = [_values(row, real, floor, world, seed=subject.seed) for row in rows]
    chance = world.first(
        lambda: {name: seen.compared(real, seed=subject.seed) for name, seen in floor.items()}
    )
    chance["self"] |= real.answers  # of the training split a probe has been told
    compared = min(MOST_KEPT, subject.num_samples, len(real.points))
    # The second row is the teacher's single step, see `samplers`.
    blind = blind_metrics(values[1], values[0], chance=chance["self"], num_samples=compared)
    told = []
    for row, value, (squares, seconds) in zip(rows, values, totals.tolist(), strict=True):
        about: dict[str, Any] = {"model": row.model, "sampler": row.sampler, "nfe": row.nfe}
        about["frechet"] = value["frechet"]
        about["ratio"] = None if "frechet" in blind else value["frechet"] / values[0]["frechet"]
        rest = {"endpoint_error": math.sqrt(squares / subject.num_samples)}
        rest["seconds_per_sample"] = seconds / subject.num_samples
        told.append(about | value | rest)
    return {"num_compared": compared, "neighbours": NEIGHBOURS, "floor": chance, "blind": blind, "rows": told}


def _values(row: Row, real: Seen, floor: dict[str, Seen], world: World, *, seed: int) -> dict[str, float]:
    """Return every metric of a row, computed by the first process; what was seen of it is let go."""
    seen = row.meter.seen(world)

    def compared() -> dict[str, float]:
        values = seen.compared(real, seed=seed)
        if "reconstruction" in floor:
            distance = frechet_distance(seen.moments, floor["reconstruction"].moments)
            values["frechet_to_reconstructions"] = distance
        return values

    return world.first(compared)


def _check_size(pictures: Tensor, held_out: Part) -> None:
    """Raise ConfigError where a network that resizes would hide that pictures have different sizes."""
    if pictures.shape[1:] != held_out.shape:
        raise ConfigError(
            f"the model makes pictures of shape {tuple(pictures.shape[1:])}, those of "
            f"{held_out.shards.folder} have {tuple(held_out.shape)}; give held-out pictures of the same size"
        )


def _shown(rows: list[Row], references: References, held_out: Part) -> dict[str, Tensor]:
    """Return the first pictures of every row, and the held-out ones beside them."""
    named = {f"{row.model}-nfe-{row.nfe:03d}": row.shown for row in rows if row.shown is not None}
    most = max(map(len, named.values()))
    named["held-out"] = real = held_out.pictures(np.arange(min(most, held_out.size)))
    if references.autoencoder is not None:
        device = references.dealer.world.device
        named["reconstructions"] = reconstruct(references.autoencoder, real.to(device)).cpu()
    return named


def noise_of(numbers: Tensor, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Return the noise (B, *shape) of the samples with these numbers, whatever process draws them."""
    return Random(seed, numbers).normal("sample", shape)


def sample_noise(count: int, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Return the noise (count, *shape) of samples 0 .. count - 1."""
    return noise_of(torch.arange(count), shape, seed=seed)
