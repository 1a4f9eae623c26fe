"""What an objective is: a frozen dataclass that is also the loss.

Its fields are its configuration, checked when it is made; `objective(model, batch, teacher)` returns a dict
with `loss`, the scalar to minimise, and anything worth logging: `error` (B,), the unweighted error of each
sample, with `time` (B,), the time it was made at, and `gap` (B,), the length of its jump, are logged by bin;
with `index` (B,), its position in the data stream, the sample is named where its error is not finite. An
objective never sees a config, an optimizer or a rank, and draws every random number from `batch.random`.
One that has a method `uses_target` is also called with a target network (target.py), or None.

A new objective is a new file in objectives/; the file's name in CamelCase is its class (`my_loss.py`:
`MyLoss`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ..models.condition import Condition, Nothing, silenced, take
from ..models.flow_map import FlowMap, Process, Velocity
from ..models.guidance import SelfGuided
from ..models.path import Linear, LogLinear, Path, Trig
from ..models.schedule import Cosine, LinearBetas, ScaledLinearBetas
from .seeds import Random

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Tangent = Literal["none", "finite_difference", "forward", "forward_with_gradient"]
Paths = Annotated[
    Linear | Trig | LogLinear | LinearBetas | ScaledLinearBetas | Cosine, Field(discriminator="name")
]


class States(NamedTuple):
    """The states x (B, K + 1, ...) of a flow from noise to data, at falling times (B, K + 1)."""

    x: Tensor
    times: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples on the model's device: `data` (B, ...), their classes or captions, their randomness.

    `batch_size` is that of an optimizer step, over all processes; None: these samples are the first step.
    `process` is that of a teacher whose states are no path's.
    """

    data: Tensor
    condition: Condition | None
    random: Random
    batch_size: int | None = None
    states: States | None = None  # of the shards that `driftmap trajectories` writes
    process: Process | None = None

    @property
    def step(self) -> Tensor:
        """Where each sample (B,) stands in the run, in optimizer steps, float64: a function of its position.

        The whole part counts the steps before it, the rest is its place in the batch of its own step.
        """
        index = self.random.index.double()
        if self.batch_size is None:
            return torch.arange(len(index), device=index.device).double() / max(1, len(index))
        return index / self.batch_size

    def noise(self) -> Tensor:
        """Return the noise (B, ...) that belongs to the data."""
        return self.random.normal("noise", tuple(self.data.shape[1:])).to(self.data.dtype)

    def of_teacher(self, teacher: Velocity | None) -> "Batch":
        """Return the batch whose states are those of a teacher's own process, if it has one."""
        return replace(self, process=teacher) if isinstance(teacher, Process) else self

    def state(self, path: Path, t: Tensor) -> Tensor:
        """Return x_t (B, ...) of the data: on the path, or in the process of the teacher."""
        if self.process is None:
            return path.state(self.data, self.noise(), t)
        draw = partial(self.random.normal, shape=tuple(self.data.shape[1:]))
        with torch.no_grad():
            return self.process.state(self.data, t, draw=draw, condition=self.condition)

    def with_condition_dropped(self, share: float, *, null: Nothing | None) -> "Batch":
        """Return the batch with a share of its conditions replaced by the one that says nothing."""
        if share == 0 or self.condition is None or null is None:
            return self
        dropped = self.random.uniform("condition dropout") < share
        return replace(self, condition=silenced(self.condition, dropped, nothing=null))

    def take(self, rows: Tensor) -> "Batch":
        """Return the samples at `rows` (a mask or indices), with their own randomness."""
        random = Random(self.random.seed, self.random.index[rows])
        states = None if self.states is None else States(*(part[rows] for part in self.states))
        condition = take(self.condition, rows)
        return replace(self, data=self.data[rows], condition=condition, random=random, states=states)


class Objective(Protocol):
    """A loss with its settings.

    It may also say `needs_teacher`, or `uses_trajectories`: shards that `driftmap trajectories` has made.
    """

    model_kind: ClassVar[str]  # the kind of network it trains
    uses_teacher: ClassVar[bool]  # whether a `teacher` section has an effect

    @property
    def tangent(self) -> Tangent:
        """What derivative of the network along a direction it takes, and whether that carries gradients."""
        ...

    def __call__(self, model: nn.Module, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return `loss` (scalar) and values to log."""
        ...


def mean_square(residual: Tensor) -> Tensor:
    """Return the mean over all axes but the first of a residual (B, ...), in fp32 or better: (B,)."""
    precise = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return precise.flatten(1).square().mean(1)


def path_velocity(path: Path, batch: Batch, t: Tensor, teacher: Velocity | None) -> tuple[Tensor, Tensor]:
    """Return the state x_t and the velocity to learn there: the teacher's, else the conditional one.

    The conditional velocity is legal here, at the conditioning point, and only here: its mean given x_t is
    the marginal velocity. The network may guide it. Source: Lipman et al., "Flow matching", 2023, theorem 2.
    """
    x = batch.state(path, t)
    if teacher is None or isinstance(teacher, SelfGuided):
        if batch.process is not None:
            raise ValueError(
                "velocity: conditional is that of data on a path, and this teacher has a process of its own; "
                "set velocity to teacher or self"
            )
        velocity = path.velocity(batch.data, batch.noise(), t)
        return x, velocity if teacher is None else teacher.guided(velocity, x, t, batch.condition)
    with torch.no_grad():
        return x, teacher.velocity(x, t, batch.condition)


def diagonal_error(model: FlowMap, path: Path, batch: Batch, t: Tensor, teacher: Velocity | None) -> Tensor:
    """Return |v(x_t, t, t) - b(x_t, t)|^2 of each sample, averaged over its dimensions: (B,)."""
    x, velocity = path_velocity(path, batch, t, teacher)
    return mean_square(model.velocity(x, t, batch.condition) - velocity)
