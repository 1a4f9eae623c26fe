"""A flow that was trained by likelihood: its velocity leads from data to N(0, I) along no path known before.

The state of data at the time t is where the flow itself takes them, so a student that is taught by one learns
at x_t = X_{0,t}(data) in place of a point of its path.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from .condition import Condition
from .flow_map import FlowMap
from .path import expand

STEPS = 16  # of Runge and Kutta's method, from data to their state


class ContinuousFlow(FlowMap):
    """A velocity whose states are its own; as a flow map it jumps by its velocity alone."""

    @classmethod
    def of(cls, network: nn.Module, means: dict[str, Any]) -> Self:
        """Return a network as the flow that it was trained to be."""
        assert means == {"kind": "continuous_flow"}, means
        return cls(network)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the velocity at s."""
        return self.predict(x, s, s, condition)

    @torch.no_grad()
    def state(
        self,
        data: Tensor,
        t: Tensor,
        *,
        draw: Callable[[str], Tensor] | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """Return X_{0,t}(data) (B, ...) for times t (B,), by dx/du = t b(x, t u), 0 <= u <= 1; no noise."""

        def flow(u: Tensor, x: Tensor) -> Tensor:
            return expand(t, x) * self.velocity(x, t * u.to(t.dtype), condition)

        ends = torch.tensor([0.0, 1.0], device=data.device)
        states: Any = odeint(flow, data, ends, method="rk4", options={"step_size": 1 / STEPS})
        return states[-1]
