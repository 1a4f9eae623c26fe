"""The Lagrangian rule: the end of a jump moves with the velocity found there.

    residual:      loss = E | v + (t - s) dv/dt - sg[ b(X_{s,t}(x), t) ] |^2
    semigradient:  loss = E | v - sg[ b(X_{s,t}(x), t) - (t - s) dv/dt ] |^2,      v = v(x, s, t),

for the jumps of a batch; see ../rule.py. Nothing differentiates through X_{s,t}(x), the input of b.

Source: d/dt X_{s,t}(x) = b(X_{s,t}(x), t); Boffi, Albergo and Vanden-Eijnden, "Flow map matching", 2024,
eq. 12.
"""

from typing import Self

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import expand
from ..objective import STRICT, Batch
from ..rule import DerivativeRule, JumpError


@dataclass(frozen=True, config=STRICT)
class Lagrangian(DerivativeRule):
    """Train a flow map by the derivative of its jumps in the target time."""

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        if self.velocity == "conditional":
            raise ValueError(
                "velocity: conditional is the data's velocity at the state x_s where a jump starts, but this "
                "rule asks for one where the jump arrives; set velocity to teacher or self, or take the "
                "eulerian rule"
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
        """Return the squared residual of the Lagrangian equation."""
        assert velocity is not None
        x = batch.state(self.path, s)
        gap = expand(t - s, x)

        def mean_velocity(end: Tensor) -> Tensor:
            return model.mean_velocity(x, s, end, batch.condition)

        v, slope = self.value_and_slope(mean_velocity, t, other=s)
        with torch.no_grad():
            arrival = velocity.velocity(x + gap * v.detach(), t, batch.condition)
        return self.tangents.error(v, -gap * slope, arrival, step=batch.step)
