"""The semigroup rule: one jump equals two jumps over a point between; no derivative is needed.

    loss = E | v(x, s, t) - sg[ r v(x, s, u) + (1 - r) v(X_{s,u}(x), u, t) ] |^2,    u = s + r (t - s), r in
    (0, 1)

for the jumps of a batch, and v(x, s, s) = b(x, s) for its diagonal samples, where b is the teacher's
velocity or, from scratch, the path's conditional one.

Source: X_{u,t} o X_{s,u} = X_{s,t} divided by t - s; Boffi, Albergo and Vanden-Eijnden, "How to build a
consistency model", 2025 (progressive self-distillation).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import Linear, expand
from ..objective import STRICT, Batch, Paths, Tangent, diagonal_error, joined, mean_square
from ..times import Pairs


@dataclass(frozen=True, config=STRICT)
class Semigroup:
    """Train a flow map by splitting its jumps, at a uniform point or in half."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = True
    tangent: ClassVar[Tangent] = "none"

    path: Paths = Field(default_factory=Linear)
    pairs: Pairs = Field(default_factory=Pairs)
    split: Literal["uniform", "half"] = "uniform"

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss and the errors of jumps and diagonal."""
        s, t = (time.to(batch.data.dtype) for time in self.pairs.sample(batch.random))
        jumps = t < s
        diagonal = diagonal_error(model, self.path, batch.take(~jumps), s[~jumps], teacher)
        jump = self.jump_error(model, batch.take(jumps), s[jumps], t[jumps])
        order = torch.cat([jumps.nonzero(), (~jumps).nonzero()]).squeeze(1)
        return joined(jump, diagonal, time=s[order], index=batch.random.index[order])

    def jump_error(self, model: FlowMap, batch: Batch, s: Tensor, t: Tensor) -> Tensor:
        """Return the squared difference between one jump and two, a sample (B,)."""
        x = self.path.state(batch.data, batch.noise(), s)
        first_part = (
            batch.random.uniform("split").to(s.dtype) if self.split == "uniform" else torch.full_like(s, 0.5)
        )
        u, r = s + first_part * (t - s), expand(first_part, x)
        with torch.no_grad():
            first = model.mean_velocity(x, s, u, batch.condition)
            second = model.mean_velocity(x + expand(u - s, x) * first, u, t, batch.condition)
        return mean_square(model.mean_velocity(x, s, t, batch.condition) - (r * first + (1 - r) * second))
