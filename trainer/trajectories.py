"""A teacher's trajectories as shards, to be solved once and learned from many times.

A sample is the states of one solution of the teacher's flow at the grid's times, from noise to data, as
`trajectory.npy` (K + 1, ...), with what it is a sample of: a class or a caption, drawn from the teacher's own
data. The card says everything about the solution, and what the data's card said: where the autoencoder is.
Noise and condition belong to the number of a sample, so that any number of processes make the same shards.

Source: trajectories that are stored before the training of a flow map: Hu et al., "CMT: mid-training for
efficient learning of consistency, mean flow, and flow map models", 2025.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..data.decode import Batch, with_floats
from ..data.drawn import Draw
from ..data.encode import encode_shards
from ..data.encoders import Encoding
from ..data.order import Mixing
from ..data.reader import Sample
from ..data.shards import ShardSet
from ..models.condition import Condition
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap, Velocity
from ..models.samplers import Sampler, sampler_of
from .build import run_recipe
from .config import ConfigError, checked
from .data_section import DataSection
from .encode import agree, sharing_work
from .latents import condition_of
from .objective import STRICT
from .recipe import TeacherSection
from .seeds import Random
from .teacher import velocity_of
from .world import World

SOLVERS = ("heun", "euler", "dpm_solver", "ddim")  # what only asks for velocities, at states of its own
STORED = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, config=STRICT)
class Request:
    """Which trajectories to make: of whom, how many, by what solver, and which of its states to keep.

    `data` is where conditions come from, by default what the teacher was trained on. By default there are as
    many trajectories as samples there; the solver is heun, and dpm_solver for a denoiser. Every `every`-th
    state is kept. A number stored in fp16 is off by a factor of up to 5e-4.
    """

    teacher: TeacherSection
    num_samples: int | None = None
    steps: int = 16
    every: int = 1
    sampler: str | None = None
    data: str | Path | None = None
    seed: int = 0
    stored: Literal["fp16", "fp32"] = "fp16"
    samples_per_shard: int = 1000
    batch_size: int = 64


def make_trajectories(
    request: Request, draw: Draw, out: Path, *, progress: Callable[[int], None] | None = None
) -> ShardSet:
    """Solve the flow of a run from noise to data and return the data set of its states.

    The conditions are those of `draw`, as `draw_of` gives it. All processes take their shares of the shards
    that are missing; a complete set is left alone.
    """
    with sharing_work() as world:
        encoding = _encoding(request, draw, world)
        agree(world, [encoding])
        return encode_shards(
            draw.as_set,
            out,
            [encoding],
            batch_size=request.batch_size,
            processes=world,
            progress=progress,
            reader=draw.reader,
        )


def draw_of(request: Request) -> Draw:
    """Return the samples whose conditions the trajectories are of."""
    section = checked(DataSection, run_recipe(request.teacher.run)["data"], place="data")
    if request.data is None:
        shards, mixing = section.open(), section.mixing
    else:
        shards, mixing = ShardSet.open(request.data).labelled_by(section.label), Mixing()
    there = shards.num_samples
    wanted = there if request.num_samples is None else request.num_samples
    return Draw(shards, wanted, request.samples_per_shard, request.seed, mixing)


def _encoding(request: Request, draw: Draw, world: World) -> Encoding:
    """Return what makes a trajectory of each drawn sample, and what the card says of it."""
    velocity, model, weights = velocity_of(request.teacher, draw.shards, world.device)
    model.eval()
    name = request.sampler or ("dpm_solver" if isinstance(model, Denoiser) else "heun")
    if name not in SOLVERS:
        raise ConfigError(
            f"--sampler {name}: expected one that solves the flow's equation, {', '.join(SOLVERS)}"
        )
    if request.steps % request.every:
        raise ConfigError(
            f"--every {request.every} does not divide --steps {request.steps}; the last state is the data"
        )
    sampler = sampler_of(name, path=model.path_of_states, draw=_nothing)
    grid = sampler.grid(request.steps)
    solver = _Solver(request, draw, velocity, model, sampler, grid.to(world.device))
    cost = sampler.evaluations * getattr(velocity, "evaluations", 1)
    teacher = TypeAdapter(TeacherSection).dump_python(request.teacher, mode="json")
    about = {
        "teacher": {name: value for name, value in teacher.items() if name not in ("run", "weak", "shard")},
        "weights": weights,
        "path": dataclasses.asdict(model.path),
        "conditions_of": draw.shards.fingerprint,
        "num_samples": draw.num_samples,
        "samples_per_shard": draw.samples_per_shard,
        "sampler": name,
        "steps": request.steps,
        "nfe": request.steps * cost,
        "times": grid[:: request.every].tolist(),
        "stored": request.stored,
        "seed": request.seed,
    }
    return Encoding(solver, {"trajectories": about}, lambda: {"trajectories": about | {"teacher": teacher}})


def _nothing(step: int) -> Tensor:
    """Raise, as none of these samplers draws anything on its way."""
    raise AssertionError("a trajectory is solved without drawing anything")


@dataclasses.dataclass(frozen=True)
class _Solver:
    """Makes the trajectories of samples that have their numbers as keys."""

    request: Request
    draw: Draw
    velocity: Velocity
    model: FlowMap
    sampler: Sampler
    grid: Tensor
    extension: str = "trajectory.npy"
    replaces: Collection[str] = ()

    def load(self, samples: Sequence[Sample]) -> Batch:
        """Return the numbers of the samples and what labels them."""
        numbers = np.array([int(sample.key) for sample in samples])
        return {"index": torch.from_numpy(numbers), **self.draw.labels(numbers)}

    def encode(self, loaded: Batch) -> Iterable[np.ndarray]:
        """Return the states (K + 1, ...) of each sample."""
        batch = {name: value.to(self.grid.device) for name, value in with_floats(loaded).items()}
        random = Random(self.request.seed, batch["index"])
        noise = random.normal("trajectory noise", self.model.sample_shape)
        condition = None if self.model.null_condition is None else condition_of(batch)
        states = solve(self.velocity, noise, sampler=self.sampler, grid=self.grid, condition=condition)
        kept = torch.stack(states[:: self.request.every], dim=1)
        return kept.to("cpu", STORED[self.request.stored]).numpy()


def solve(
    velocity: Velocity, noise: Tensor, *, sampler: Sampler, grid: Tensor, condition: Condition | None = None
) -> list[Tensor]:
    """Return the states (B, ...) of a sampler at the times of a grid, of which the first are the noise.

    They are the last ones at which it asked for the velocity of each time: Heun's method comes to a time with
    Euler's step first, and with its own one then.
    """
    asked = _Asked(velocity)
    end = sampler.sample(asked, noise, grid=grid, condition=condition)
    return [*(asked.states[time] for time in grid[:-1].to(noise.dtype).tolist()), end]


class _Asked:
    """A velocity that remembers the last state at which it was asked for, at each time."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.states: dict[float, Tensor] = {}

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the velocity (B, ...) at x and times t (B,), which are all the same."""
        self.states[t[0].item()] = x
        return self.inner.velocity(x, t, condition)
