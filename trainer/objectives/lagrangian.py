"""The Lagrangian rule: the end of a jump moves with the velocity found there.

    residual:      loss = E | v + (t - s) dv/dt - sg[ b(X_{s,t}(x), t) ] |^2
    semigradient:  loss = E | v - sg[ b(X_{s,t}(x), t) - (t - s) dv/dt ] |^2,      v = v(x, s, t),

for the jumps of a batch, and v(x, s, s) = b(x, s) for its diagonal samples. b is the teacher's velocity or
the network's own diagonal; at the end of a jump the conditional velocity is not legal. Nothing
differentiates through X_{s,t}(x), the teacher's input.

Source: d/dt X_{s,t}(x) = b(X_{s,t}(x), t); Boffi, Albergo and Vanden-Eijnden, "Flow map matching", 2024,
eq. 12.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import Linear, expand
from ..objective import STRICT, Batch, Paths, Tangent, diagonal_error, joined, mean_square
from ..tangent import Derivative, time_derivative
from ..times import Pairs


@dataclass(frozen=True, config=STRICT)
class Lagrangian:
    """Train a flow map by the derivative of its jumps in the target time."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = True

    path: Paths = Field(default_factory=Linear)
    pairs: Pairs = Field(default_factory=Pairs)
    gradient: Literal["residual", "semigradient"] = "residual"
    derivative: Derivative = "forward"

    @property
    def tangent(self) -> Tangent:
        """The derivative in the target time; the residual differentiates it again."""
        if self.derivative == "finite_difference":
            return "finite_difference"
        return "forward_with_gradient" if self.gradient == "residual" else "forward"

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss and the errors of jumps and diagonal."""
        s, t = (time.to(batch.data.dtype) for time in self.pairs.sample(batch.random))
        jumps = t < s
        diagonal = diagonal_error(model, self.path, batch.take(~jumps), s[~jumps], teacher)
        jump = self.jump_error(model, batch.take(jumps), s[jumps], t[jumps], teacher or model)
        order = torch.cat([jumps.nonzero(), (~jumps).nonzero()]).squeeze(1)
        return joined(jump, diagonal, time=s[order], index=batch.random.index[order])

    def jump_error(self, model: FlowMap, batch: Batch, s: Tensor, t: Tensor, velocity: Velocity) -> Tensor:
        """Return the squared residual of the Lagrangian equation, a sample (B,)."""
        x = self.path.state(batch.data, batch.noise(), s)
        gap = expand(t - s, x)

        def mean_velocity(target: Tensor) -> Tensor:
            return model.mean_velocity(x, s, target, batch.condition)

        if self.gradient == "residual":
            v, slope = time_derivative(mean_velocity, t, how=self.derivative)
        else:
            v = mean_velocity(t)
            with torch.no_grad():
                _, slope = time_derivative(mean_velocity, t, how=self.derivative)
        with torch.no_grad():
            arrival = velocity.velocity(x + gap * v.detach(), t, batch.condition)
        return mean_square(v + gap * slope - arrival)
