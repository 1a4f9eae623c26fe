"""The exact density that the flow of a velocity gives to data, by the change of variables along the flow.

    dx/dt = b(x, t),   d log p_t(x_t) / dt = -div b(x_t, t)
    log p(data) = log N(x_1; 0, I) + int_0^1 div b(x_t, t) dt,   x_0 = data

The divergence is the exact trace of the Jacobian, or for many dimensions Hutchinson's estimate e^T J e with
one probe e a sample for the whole solve: a probe drawn anew inside would make a noise of what the solver
takes for smooth. Both are products of the Jacobian from the left (reverse mode), which every attention kernel
has. The state and the integral are in float64, the velocity is asked in the precision of the
data.

This density is the one of the flow, not of any chain with noise: it is no bound, and not to be compared with
one unless the velocity is exact.

Source: Chen et al., "Neural ordinary differential equations", 2018, eq. 8; Grathwohl et al., "FFJORD", 2019,
eq. 8; Song et al., "Score-based generative modeling through SDEs", 2021, eq. 39.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from .bound import gaussian
from .condition import Condition
from .flow_map import Velocity

Interval = tuple[float, float]


@dataclass(frozen=True)
class FixedSteps:
    """A grid of `steps`: Heun's method (order 2, two evaluations a step) or Runge and Kutta's (4 and four).

    Times are cubes of an even grid: near the data, which the flow leaves fastest, steps are short. An even
    grid of five times the steps did worse on pixels.
    """

    method: Literal["heun", "rk4"]
    steps: int

    def settings(self, interval: Interval) -> dict[str, Any]:
        """Return what torchdiffeq needs to be told."""
        first, last = torch.tensor(interval, dtype=torch.float64)
        grid = torch.lerp(first, last, torch.linspace(0, 1, self.steps + 1, dtype=torch.float64) ** 3)
        method = {"heun": "heun2", "rk4": "rk4"}[self.method]
        return {"method": method, "options": {"grid_constructor": lambda f, y, t: grid.to(t.device)}}


@dataclass(frozen=True)
class Adaptive:
    """Dormand and Prince's method of order 5, to a relative and absolute `tolerance` of a whole batch."""

    tolerance: float
    max_evaluations: int = 10_000  # of the velocity, where the solver is stopped
    method: Literal["dopri5"] = "dopri5"

    def settings(self, interval: Interval) -> dict[str, Any]:
        """Return what torchdiffeq needs to be told."""
        return {"method": self.method, "rtol": self.tolerance, "atol": self.tolerance}


Solver = FixedSteps | Adaptive


@torch.no_grad()
def log_density(
    model: Velocity,
    data: Tensor,
    *,
    condition: Condition | None = None,
    probe: Tensor | None,
    solver: Solver,
    interval: Interval = (0.0, 1.0),
) -> tuple[Tensor, int]:
    """Return log p(data) (B,) in float64 and the evaluations of the velocity that it took.

    `probe` (B, ...) has independent entries of zero mean and unit variance; None takes the exact trace. The
    flow is followed over `interval`: data are taken as states at its lower end, and those at its upper end
    as N(0, I).

    Raises FloatingPointError where the solver takes steps too small for float64 or too many of them.
    """
    evaluations, reached = 0, interval[0]
    most = solver.max_evaluations if isinstance(solver, Adaptive) else math.inf

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations, reached
        evaluations, reached = evaluations + 1, float(t)
        if evaluations > most:
            raise FloatingPointError(f"more than {most} evaluations of the velocity")
        times = t.to(data.dtype).expand(len(data))
        velocity, divergence = _velocity_and_divergence(
            lambda x: model.velocity(x, times, condition), state[0].to(data.dtype), probe
        )
        return velocity.double(), divergence

    start = data.double(), torch.zeros(len(data), dtype=torch.float64, device=data.device)
    times = torch.tensor(interval, dtype=torch.float64, device=data.device)
    try:
        states, integrals = odeint(flow, start, times, **solver.settings(interval))
    except (AssertionError, FloatingPointError) as error:  # torchdiffeq (0.2.5) asserts what it cannot do
        raise FloatingPointError(
            f"the flow could not be followed beyond t = {reached:.4g} ({error}) after {evaluations} "
            "evaluations: give a larger tolerance, or a solver of fixed steps such as rk4:50"
        ) from error
    end = states[-1]
    return gaussian(end, torch.zeros_like(end), torch.ones_like(integrals[-1])) + integrals[-1], evaluations


def _velocity_and_divergence(
    velocity: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return b (B, ...) and div b (B,) in float64: exact, or e^T J e for a probe e (B, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = velocity(x)

    def along(direction: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(value, x, direction, retain_graph=probe is None)
        return (slope.double() * direction).flatten(1).sum(1)

    if probe is not None:
        return value.detach(), along(probe.to(value.dtype))
    axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
    return value.detach(), torch.stack([along(axis.expand_as(x)) for axis in axes]).sum(0)
