"""The Eulerian rule: a jump arrives at the same place from all states of one trajectory.

    residual:      loss = E | v - (t - s) D v - b |^2,         D v = dv/ds + dv/dx b,    v = v(x, s, t),
    semigradient:  loss = E | v - sg[ b + (t - s) D v ] |^2,   b = b(x, s),

for the jumps of a batch; see ../rule.py. With the data's velocity for b

    the semigradient is MeanFlow: its target is linear in b, and so right in the mean. The residual is not:
    its mean holds (t - s)^2 times the variance of dv/dx b as well, and it is refused.
    with `direction: self` it is improved MeanFlow: only the target is the data's velocity, the derivative
    goes along the network's own. A regression on data, of which the residual is legal, too.

On the path trig, with jumps to t = 0, the semigradient is sCM's but for a factor of s. With a = pi s / 2 and
the jump X = cos(a) x - sin(a) F, what sCM adds to F is (2 / pi) cos(a) times what this rule adds to v:

    -cos^2(a) (F - dx/da) - cos(a) sin(a) (x + dF/da) = (2 / pi) cos(a) (b + (t - s) D v - v).

Only during sCM's warm-up of the second term do the two differ, as v goes straight on and F round the circle.

Sources: d/ds X_{s,t}(x) + grad X_{s,t}(x) b(x, s) = 0; Boffi, Albergo and Vanden-Eijnden, "Flow map
matching", 2024; Geng et al., "Mean flows for one-step generative modeling", 2025; Geng et al., "Improved mean
flows", 2025; Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", 2025.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import expand
from ..objective import STRICT, Batch, path_velocity
from ..rule import DerivativeRule, JumpError, Source


@dataclass(frozen=True, config=STRICT)
class Eulerian(DerivativeRule):
    """Train a flow map by the derivative of its jumps along the trajectory that they start from."""

    gradient: Literal["residual", "semigradient"] = "semigradient"
    direction: Literal["velocity", "self"] = "velocity"  # of the derivative: b, or the network's own velocity

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        if self.velocity == "conditional" and self._takes_square:
            raise ValueError(
                "velocity: conditional is right in the mean, but gradient residual takes the square of its "
                "derivative, which learns a wrong map; set gradient to semigradient, direction to self, or "
                "velocity to teacher or self"
            )
        if self.direction == "self" and self.velocity == "self":
            raise ValueError("direction: self has no effect with velocity self, the same; remove it")
        return self

    @property
    def _takes_square(self) -> bool:
        """Whether the velocity to learn from enters the error squared, by the derivative along it."""
        return self.gradient == "residual" and self.direction == "velocity"

    @property
    def asks_itself(self) -> bool:
        """Whether the derivative is along the network's own velocity."""
        return self.direction == "self"

    @property
    def usual_velocity(self) -> Source:
        """The data's where it is legal, else the network's own."""
        return "self" if self._takes_square else "conditional"

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
        """Return the squared residual of the Eulerian equation."""
        x, learned = path_velocity(self.path, batch, s, velocity)
        along = learned
        if self.direction == "self":
            with torch.no_grad():
                along = target.velocity(x, s, batch.condition)

        def mean_velocity(start: Tensor) -> Tensor:
            return model.mean_velocity(x + expand(start - s, x) * along, start, t, batch.condition)

        v, slope = self.value_and_slope(mean_velocity, s, other=t)
        return self.tangents.error(v, expand(t - s, x) * slope, learned, step=batch.step)
