"""Distribution matching: a student's samples are moved to where the teacher's data are denser than its own.

    y = X_{s,0}(sg[X_{1,s}(noise)]),  y_r = alpha_r y + sigma_r noise',  g = D_own(y_r, r) - D_teacher(y_r, r)
    loss = E | y - sg[y - g / mean|y - D_teacher|] |^2 / 2
         + diagonal_weight E | v(sg[y_r], r, r) - (alpha_r' sg[y] + sigma_r' noise') |^2

D is the mean of the data that a velocity means at (y_r, r). The difference of two D is sigma_r^2 / alpha_r
times that of two scores, so g is the gradient of KL(student | teacher) at the noise of r, and vanishes where
the two densities agree. On the linear path D_own - D_teacher = -r (v_own - b). No third network tells
D_own: the student's own diagonal does, and the second term keeps it to the velocity of the student's samples,
by flow matching on them. Data are not used, only their conditions.

A polish for a map that has been distilled: a diagonal that still is the teacher's says g = 0 everywhere,
until the second term has moved it to the student's samples.

With `fake_network` a third network tells D_own after all: a copy of the student at its start, which learns
the second term in every step, on the student's samples, by an optimizer of its own (fake.py), while the
student learns the first one in every `student_every`-th step. Its diagonal is then held to nothing, and what
it is good for are samples in one and two jumps.

Sources: Yin et al., "One-step diffusion with distribution matching distillation", 2024, eqs. 7 and 8; the
flow map's own velocity in place of a network for it: after the idea of arXiv 2605.19256.
"""

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Process, Velocity
from ...models.path import Linear, expand
from ..objective import STRICT, Batch, Paths, Tangent, mean_square
from ..times import Times, Uniform


@dataclass(frozen=True, config=STRICT)
class DistributionMatching:
    """Polish a flow map on its own samples; a share `one_jump` of them is made in one, the others in two."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    tangent: ClassVar[Tangent] = "none"

    path: Paths = Field(default_factory=Linear)
    times: Times = Field(default_factory=Uniform)
    one_jump: Annotated[float, Field(ge=0, le=1)] = 0.5
    diagonal_weight: Annotated[float, Field(gt=0)] = 1.0
    fake_network: bool = False
    student_every: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.fake_network and self.diagonal_weight != 1:
            raise ValueError(
                "diagonal_weight has no effect with fake_network, which learns that term by an optimizer of "
                "its own; set optimizer.fake_lr instead"
            )
        if self.student_every != 1 and not self.fake_network:
            raise ValueError(
                "student_every has no effect without a fake network to learn in between; set fake_network to "
                "true, or remove it"
            )
        return self

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss, the error of the diagonal on the student's samples, and the size of g."""
        assert teacher is not None
        if isinstance(teacher, Process):
            raise ValueError(
                "distribution matching adds noise along a path, and this teacher has a process of its own; "
                "give one that was trained along a path"
            )
        own, learns = model if model.fake is None else model.fake, self.student_learns(batch)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            y = self.samples(model, batch)
        r = self.times.sample(batch.random).to(y.dtype)
        noise = batch.random.normal("renoise", tuple(y.shape[1:])).to(y.dtype)
        fixed = y.detach()
        state = self.path.state(fixed, noise, r)
        said = own.velocity(state, r, batch.condition)
        diagonal = mean_square(said - self.path.velocity(fixed, noise, r))
        told: dict[str, Any] = {"error": diagonal, "error_diagonal": diagonal, "time": r}
        told["index"] = batch.random.index
        if not learns:
            return {"loss": diagonal.mean(), **told}
        with torch.no_grad():
            wanted = self._data(teacher.velocity(state, r, batch.condition), state, r)
            g = self._data(said, state, r) - wanted
            scale = (fixed - wanted).abs().flatten(1).mean(1)
            moved = fixed - g / expand(scale.clamp(min=torch.finfo(y.dtype).tiny), g)
        loss = mean_square(y - moved).mean() / 2 + self.diagonal_weight * diagonal.mean()
        return {"loss": loss, "gap_to_teacher": mean_square(g).sqrt(), **told}

    def student_learns(self, batch: Batch) -> bool:
        """Return whether the student moves in the step of a batch; where nothing is trained it does."""
        if self.student_every == 1 or not torch.is_grad_enabled():
            return True
        return (int(batch.step[0]) + 1) % self.student_every == 0

    def samples(self, model: FlowMap, batch: Batch) -> Tensor:
        """Return the student's samples (B, ...), whose last jump carries a gradient."""
        noise, one = batch.noise(), torch.ones(len(batch.data)).to(batch.data)
        s = batch.random.uniform("source").to(one)
        s = torch.where(batch.random.uniform("one jump").to(one) < self.one_jump, one, s)
        with torch.no_grad():
            x = model.jump(noise, one, s, batch.condition)
        return model.jump(x, s, torch.zeros_like(s), batch.condition)

    def _data(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the mean of the data (B, ...) that a velocity means at x and t."""
        return self.path.end_points(x, velocity, t, kind="velocity")[0]
