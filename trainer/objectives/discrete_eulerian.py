"""The Eulerian rule by a short step along the trajectory in place of a derivative.

    loss = E 1 / a | v(x, s, t) - sg[ a b + (1 - a) v(x', s', t) ] |^2,
    s' = s + a (t - s),    x' = x + (s' - s) b,    b = b(x, s),    a in (0, 1],

for the jumps of a batch; see ../rule.py. a = 1 is regression on the velocity; as a falls to 0 the gradient
tends to that of the Eulerian semigradient, with an error of order a, or a^2 by Heun's step. So a may fall
during a run. Errors are logged as |v - sg[...]|^2 / a^2, which is the Eulerian rule's in that limit.

Consistency models are `pairs: {to_data: 1, diagonal: 0}`, distilled with a teacher and trained without one;
alpha-Flow and SoFlow are all pairs. Forward passes are all it needs, so that it works under every strategy.
In half precision the rounding of v and its target stands over a: a of 0.01 makes 0.4 of bf16's 0.004.

Sources: Song et al., "Consistency models", 2023, algorithms 2 and 3; Zhang et al., "AlphaFlow", 2025; Luo et
al., "SoFlow", 2025.
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import expand
from ..objective import STRICT, Batch, Tangent, mean_square, path_velocity
from ..rule import JumpError, Rule, Source

Fraction = Annotated[float, Field(gt=0, le=1)]
STEEPNESS = 25  # of the sigmoid: its argument goes from -12.5 to 12.5


@dataclass(frozen=True, config=STRICT)
class Annealed:
    """A fraction that goes from `start` to `end` in `steps` optimizer steps, after `wait_steps` at `start`.

    exponential: by the same factor in every step (SoFlow: from 0.1 to 0.002); sigmoid: along a logistic curve
    of which 25 units are seen (alpha-Flow: from 1 to 0.005). With `stages` it stays the same for a stage at a
    time: exponential from 1/10 to 1/1280 in 8 stages is the doubling of iCT's steps, ECT's is like it.

    Sources: Song and Dhariwal, "Improved techniques for training consistency models", 2024, section 3.4; Geng
    et al., "Consistency models made easy", 2025; the settings of alpha-Flow's published code.
    """

    shape: Literal["linear", "exponential", "sigmoid"]
    start: Fraction
    end: Fraction
    steps: Annotated[int, Field(ge=1)]
    wait_steps: Annotated[int, Field(ge=0)] = 0
    stages: Annotated[int, Field(ge=2)] | None = None

    def __call__(self, step: Tensor) -> Tensor:
        """Return the fractions (B,) for samples that `step` (B,) optimizer steps came before."""
        done = ((step.floor() - self.wait_steps) / self.steps).clamp(0, 1)
        if self.stages is not None:
            done = (done * self.stages).floor().clamp(max=self.stages - 1) / (self.stages - 1)
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** done
        if self.shape == "sigmoid":
            done = torch.sigmoid(STEEPNESS * (done - 0.5))
        return self.start + (self.end - self.start) * done


def _kind(value: object) -> str:
    return "schedule" if isinstance(value, dict | Annealed) else "number"  # so that one mistake is told once


Fractions = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[Annealed, Tag("schedule")], Discriminator(_kind)
]


@dataclass(frozen=True, config=STRICT)
class DiscreteEulerian(Rule):
    """Train a flow map to arrive where it does from a little further on, `fraction` of the way."""

    tangent: ClassVar[Tangent] = "none"
    asks_itself: ClassVar[bool] = True

    fraction: Fractions = 0.1
    solver: Literal["euler", "heun"] = "euler"  # of the short step

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        if self.solver == "heun" and self.velocity == "conditional":
            raise ValueError(
                "solver: heun asks for a second velocity at x', where the data's one, velocity conditional, "
                "does not hold; set velocity to teacher or self, or solver to euler"
            )
        return self

    @property
    def usual_velocity(self) -> Source:
        """The data's where it is legal, else the network's own."""
        return "self" if self.solver == "heun" else "conditional"

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
        """Return the squared difference between one jump and a short step with a jump after it."""
        x, b = path_velocity(self.path, batch, s, velocity)
        fraction = self._fraction(batch.step).to(s.dtype)
        between, a = s + fraction * (t - s), expand(fraction, x)
        length = expand(between - s, x)
        with torch.no_grad():
            if self.solver == "heun":
                assert velocity is not None
                b = (b + velocity.velocity(x + length * b, between, batch.condition)) / 2
            rest = target.mean_velocity(x + length * b, between, t, batch.condition)
        difference = model.mean_velocity(x, s, t, batch.condition) - (a * b + (1 - a) * rest)
        error = mean_square(difference)
        return JumpError(error / fraction**2, error / fraction)

    def _fraction(self, step: Tensor) -> Tensor:
        """Return the fractions (B,) of samples."""
        return self.fraction(step) if isinstance(self.fraction, Annealed) else 0 * step + self.fraction
