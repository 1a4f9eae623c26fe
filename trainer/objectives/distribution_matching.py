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

Sources: Yin et al., "One-step diffusion with distribution matching distillation", 2024, eqs. 7 and 8; the
flow map's own velocity in place of a network for it: after the idea of arXiv 2605.19256.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
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

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss, the error of the diagonal on the student's samples, and the size of g."""
        assert teacher is not None
        y = self.samples(model, batch)
        r = self.times.sample(batch.random).to(y.dtype)
        noise = batch.random.normal("renoise", tuple(y.shape[1:])).to(y.dtype)
        fixed = y.detach()
        state = self.path.state(fixed, noise, r)
        own = model.velocity(state, r, batch.condition)
        with torch.no_grad():
            wanted = self._data(teacher.velocity(state, r, batch.condition), state, r)
            g = self._data(own, state, r) - wanted
            scale = (fixed - wanted).abs().flatten(1).mean(1)
            moved = fixed - g / expand(scale.clamp(min=torch.finfo(y.dtype).tiny), g)
        diagonal = mean_square(own - self.path.velocity(fixed, noise, r))
        loss = mean_square(y - moved).mean() / 2 + self.diagonal_weight * diagonal.mean()
        told = {"error": diagonal, "error_diagonal": diagonal, "time": r, "index": batch.random.index}
        return {"loss": loss, "gap_to_teacher": mean_square(g).sqrt(), **told}

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
