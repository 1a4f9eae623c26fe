"""The exact density that the flow of a velocity gives to data, by the change of variables along the flow.

    dx/dt = b(x, t),   d log p_t(x_t) / dt = -div b(x_t, t)
    log p(data) = log N(x_1; 0, I) + int_0^1 div b(x_t, t) dt,   x_0 = data

The divergence is the exact trace of the Jacobian, or for many dimensions Hutchinson's estimate e^T J e with
one probe e a sample for the whole solve: a probe drawn anew inside would make a noise of what the solver
takes for smooth. Both are products of the Jacobian from the left (reverse mode), which every attention kernel
has. The state and the integral are in float64, the velocity is asked in the precision of the
data.

A density can be trained: through a fixed grid the gradient is autograd's, exact for what the grid computes,
and all of its evaluations are in memory; of an adaptive solve it comes from the adjoint equation, solved
backwards to the same tolerance in the memory of one evaluation. Attention is `math` there: a divergence with
a gradient is a second derivative, which torch's fused kernels do not have.

This density is the one of the flow, not of any chain with noise: it is no bound, and not to be compared with
one unless the velocity is exact.

Source: Chen et al., "Neural ordinary differential equations", 2018, eq. 8; Grathwohl et al., "FFJORD", 2019,
eq. 8; Song et al., "Score-based generative modeling through SDEs", 2021, eq. 39; the penalties: Finlay et
al., "How to train your neural ODE", 2020.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchdiffeq import odeint, odeint_adjoint

from .bound import gaussian
from .condition import Condition
from .flow_map import Velocity

Interval = tuple[float, float]
INSTEAD = "give a larger tolerance, or a solver of fixed steps such as rk4:50"


@dataclass(frozen=True)
class FixedSteps:
    """A grid of `steps`: Heun's method (order 2, two evaluations a step) or Runge and Kutta's (4 and four).

    Times are cubes of an even grid: near the data, which the flow of a diffusion leaves fastest, steps are
    short. An even grid (`power` 1) of five times the steps did worse on pixels.
    """

    method: Literal["heun", "rk4"]
    steps: int
    power: int = 3

    def settings(self, interval: Interval) -> dict[str, Any]:
        """Return what torchdiffeq needs to be told."""
        first, last = torch.tensor(interval, dtype=torch.float64)
        even = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        grid = torch.lerp(first, last, even**self.power)
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


def parse_solver(text: str) -> Solver:
    """Return the solver of a text such as heun:100, rk4:50 or dopri5:1e-5; ValueError where it is none."""
    found = re.fullmatch(r"(heun|rk4):([1-9]\d*)|dopri5:(\d*\.?\d+(?:e-?\d+)?)", text)
    if found and found[1]:
        return FixedSteps("heun" if found[1] == "heun" else "rk4", int(found[2]))
    if found and float(found[3]) > 0:
        return Adaptive(float(found[3]))
    raise ValueError(
        f"solver {text}: expected heun or rk4 with a number of steps, or dopri5 with a tolerance, such as "
        "heun:100, rk4:50 or dopri5:1e-5"
    )


class Penalties(NamedTuple):
    """What int |b|^2 dt and int |J|^2 dt count for: straight and slow flows take few evaluations.

    |J|^2 is that of the Jacobian's entries, or with a probe its estimate |e^T J|^2.
    """

    kinetic: float = 0.0
    jacobian: float = 0.0


NO_PENALTIES = Penalties()


class Found(NamedTuple):
    """What a solve found of each sample (B,), in float64, and the evaluations that it took."""

    log_density: Tensor
    penalty: Tensor
    evaluations: int


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
    flow = Flow(model, condition, probe, solver)
    return flow.solve(data, (), interval).log_density, flow.evaluations


class Flow:
    """The equation of state, log-density and penalty of a batch, as torchdiffeq asks for it.

    `advice` says what to do where a solve takes more than the solver's `max_evaluations`, those of the
    adjoint equation included.
    """

    def __init__(
        self,
        model: Velocity,
        condition: Condition | None,
        probe: Tensor | None,
        solver: Solver,
        *,
        penalties: Penalties = NO_PENALTIES,
        advice: str = INSTEAD,
    ) -> None:
        self._model, self._condition, self._probe, self._solver = model, condition, probe, solver
        self._penalties, self._advice = penalties, advice
        self._most = solver.max_evaluations if isinstance(solver, Adaptive) else math.inf
        self.evaluations, self._reached = 0, 0.0

    def solve(self, data: Tensor, parameters: Sequence[Tensor], interval: Interval = (0.0, 1.0)) -> Found:
        """Follow the flow from data (B, ...); where gradients are on, with those of the `parameters`."""
        self._dtype, self.evaluations = data.dtype, 0
        zeros = torch.zeros(len(data), dtype=torch.float64, device=data.device)
        times = torch.tensor(interval, dtype=torch.float64, device=data.device)
        settings = self._solver.settings(interval)
        try:
            if isinstance(self._solver, Adaptive) and torch.is_grad_enabled():
                found = odeint_adjoint(
                    self,
                    (data.double(), zeros, zeros),
                    times,
                    **settings,
                    adjoint_params=tuple(parameters),
                    adjoint_options={"norm": "seminorm"},  # the gradient's own error steers no steps
                )
            else:
                found = odeint(self, (data.double(), zeros, zeros), times, **settings)
        except AssertionError as error:  # torchdiffeq (0.2.5) asserts what it cannot do
            raise self._refusal(error) from error
        end, divergence, penalty = (state[-1] for state in found)
        density = gaussian(end, torch.zeros_like(end), torch.ones_like(divergence)) + divergence
        return Found(density, penalty, self.evaluations)

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity (B, ...), its divergence (B,) and the rate of the penalty (B,)."""
        self.evaluations, self._reached = self.evaluations + 1, float(t.detach())
        if self.evaluations > self._most:
            raise self._refusal(f"more than {self._most} evaluations of the velocity")
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            seen = x.to(self._dtype)
            times = t.detach().to(self._dtype).expand(len(x))
            if trained:
                with sdpa_kernel(SDPBackend.MATH):
                    velocity = self._model.velocity(seen, times, self._condition)
            else:
                velocity = self._model.velocity(seen, times, self._condition)
            divergence, square = _divergence(velocity, seen, self._probe, trained=trained)
        velocity = velocity.double() if trained else velocity.detach().double()
        kinetic = velocity.flatten(1).square().sum(1)
        return velocity, divergence, self._penalties.kinetic * kinetic + self._penalties.jacobian * square

    def _refusal(self, reason: object) -> FloatingPointError:
        return FloatingPointError(
            f"the flow could not be followed beyond t = {self._reached:.4g} ({reason}) after "
            f"{self.evaluations} evaluations: {self._advice}"
        )


def _divergence(velocity: Tensor, x: Tensor, probe: Tensor | None, *, trained: bool) -> tuple[Tensor, Tensor]:
    """Return div b and |J|^2 (B,) in float64: exact, or e^T J e and |e^T J|^2 for a probe e (B, ...)."""

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = torch.autograd.grad(
            velocity, x, direction, retain_graph=trained or probe is None, create_graph=trained
        )
        slope = slope.double()
        return (slope * direction).flatten(1).sum(1), slope.flatten(1).square().sum(1)

    if probe is not None:
        return along(probe.to(velocity.dtype))
    axes = torch.eye(x[0].numel(), dtype=velocity.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
    parts = [along(axis.expand_as(x)) for axis in axes]
    traces, squares = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    return traces, squares
