"""The semigroup rule: one jump equals two jumps over a point between; no derivative is needed.

    loss = E | v(x, s, t) - sg[ r v(x, s, u) + (1 - r) v(X_{s,u}(x), u, t) ] |^2,    u = s + r (t - s), r in
    (0, 1)

for the jumps of a batch; see ../rule.py. Shortcut models are its halves on dyadic gaps.

Source: X_{u,t} o X_{s,u} = X_{s,t} divided by t - s; Boffi, Albergo and Vanden-Eijnden, "How to build a
consistency model", 2025 (progressive self-distillation).
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import expand
from ..objective import STRICT, Batch, Tangent
from ..rule import JumpError, Rule


@dataclass(frozen=True, config=STRICT)
class Semigroup(Rule):
    """Train a flow map by splitting its jumps, at a uniform point or in half."""

    tangent: ClassVar[Tangent] = "none"
    asks_itself: ClassVar[bool] = True

    split: Literal["uniform", "half"] = "uniform"

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        if self.velocity is not None:
            raise ValueError(
                f"velocity: {self.velocity} has no effect on this rule, whose jumps learn from two jumps of "
                "the network itself; remove it. The diagonal learns from the teacher if there is one, else "
                "from the data"
            )
        return self

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
        """Return the squared difference between one jump and two."""
        x = batch.state(self.path, s)
        first_part = (
            batch.random.uniform("split").to(s.dtype) if self.split == "uniform" else torch.full_like(s, 0.5)
        )
        u, r = s + first_part * (t - s), expand(first_part, x)
        with torch.no_grad():
            first = target.mean_velocity(x, s, u, batch.condition)
            second = target.mean_velocity(x + expand(u - s, x) * first, u, t, batch.condition)
        v = model.mean_velocity(x, s, t, batch.condition)
        return JumpError.of(v - (r * first + (1 - r) * second))
