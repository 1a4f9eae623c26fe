"""Trajectory regression: jumps learn from the states of a teacher's solution, stored once as shards.

    loss = E | v(x_i, t_i, t_j) - (x_j - x_i) / (t_j - t_i) |^2

for the jumps of a batch, from any state of a trajectory to any other, and for its diagonal samples
v(x_i, t_i, t_i) = (x_{i+1} - x_{i-1}) / (t_{i+1} - t_{i-1}), the slope between the neighbours, one-sided at
the ends. Targets do not move and ask for no network: the cost of the solution is shared by all pairs of its
states, and data are not needed. A stable start for the other rules, which know no solver's error.

Pairs are drawn as elsewhere and moved to the nearest times of the grid, jumps to different ones. With
`pairs: {to_data: 1}` all jumps end at data, and with `from_noise: 1` all begin at noise.

Source: Hu et al., "CMT: mid-training for efficient learning of consistency, mean flow, and flow map models",
2025, where t_j is 0.
"""

from typing import ClassVar, Self

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import expand
from ..objective import STRICT, Batch, States, Tangent, mean_square
from ..rule import JumpError, Rule


@dataclass(frozen=True, config=STRICT)
class Trajectory(Rule):
    """Train a flow map on the trajectories that `driftmap trajectories` has stored."""

    uses_teacher: ClassVar[bool] = False
    uses_trajectories: ClassVar[bool] = True
    tangent: ClassVar[Tangent] = "none"

    @model_validator(mode="after")
    def _guidance_has_meaning(self) -> Self:  # in place of the rule's, which would ask for a dropout
        for name, given in (("velocity", self.velocity), ("guidance", self.guidance)):
            if given is not None:
                raise ValueError(
                    f"{name}: has no effect, as jumps and diagonal learn from stored states; remove it. What "
                    "guided the teacher is said to `driftmap trajectories`"
                )
        if self.condition_dropout:
            raise ValueError(
                f"condition_dropout: {self.condition_dropout} would teach jumps without a condition the mean "
                "of jumps with one, and no trajectory shows what the teacher does without; set it to 0"
            )
        return self

    def uses_target(self, *, taught: bool) -> bool:
        """Return that a target network is asked for nothing."""
        return False

    def times_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return times of the grid near those of `pairs`, different ones where those are."""
        times = _states(batch).times
        s, t = self.pairs.sample(batch.random, batch.step)
        i, j, last = _nearest(times, s), _nearest(times, t), times.shape[1] - 1
        onwards = torch.where(t < s, 1, -1)  # times fall along a trajectory
        met = (i == j) & (s != t)
        inside = (i + onwards >= 0) & (i + onwards <= last)
        i = torch.where(met & ~inside, i - onwards, i)
        j = torch.where(met, i + onwards, j)
        return _at(times, i), _at(times, j)

    def jump_error(
        self,
        model: FlowMap,
        batch: Batch,
        s: Tensor,
        t: Tensor,
        *,
        velocity: Velocity | None,
        target: FlowMap,
    ) -> JumpError:
        """Return the squared difference to the mean velocity between two states."""
        states = _states(batch)
        i, j = _nearest(states.times, s), _nearest(states.times, t)
        predicted = model.mean_velocity(_at(states.x, i), s, t, batch.condition)
        return JumpError.of(predicted - _slope(states, i, j))

    def diagonal_error(self, model: FlowMap, batch: Batch, t: Tensor, teacher: Velocity | None) -> Tensor:
        """Return the squared difference to the slope between the states before and after t."""
        states = _states(batch)
        i, last = _nearest(states.times, t), states.times.shape[1] - 1
        slope = _slope(states, (i - 1).clamp(min=0), (i + 1).clamp(max=last))
        return mean_square(model.velocity(_at(states.x, i), t, batch.condition) - slope)


def _states(batch: Batch) -> States:
    if batch.states is None:
        raise ValueError(
            "the objective 'trajectory' learns from stored trajectories, and these samples are none; make "
            "them with `driftmap trajectories RUN OUT`, and set data.shards to OUT"
        )
    return batch.states


def _nearest(times: Tensor, t: Tensor) -> Tensor:
    """Return the places (B,) in times (B, K + 1) that are nearest to t (B,)."""
    return (times - t[:, None]).abs().argmin(1)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """Return what stands at a place (B,) of values (B, K + 1, ...)."""
    return values[torch.arange(len(values), device=values.device), place]


def _slope(states: States, i: Tensor, j: Tensor) -> Tensor:
    """Return (x_j - x_i) / (t_j - t_i) (B, ...)."""
    before, after = _at(states.x, i), _at(states.x, j)
    return (after - before) / expand(_at(states.times, j) - _at(states.times, i), after)
