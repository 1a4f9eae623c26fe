"""A continuous flow, trained by the exact likelihood of data: no path is given, the flow finds its own.

    loss = E[ -log p(data) ] / d,   log p(data) = log N(x_1; 0, I) + int_0^1 div b(x_t, t) dt,   x_0 = data

Each step of training solves an ordinary differential equation (models/ode_likelihood.py). An adaptive solver
takes as many evaluations of the network as the flow asks for, and a flow that trains becomes stiffer:
`max_evaluations` is the budget of one step, forward and backward, where the run is stopped. The penalties
keep flows slow and straight; a fixed grid costs the same at every step. `evaluations`, those of the solve
forward, are logged.

With a few dimensions the divergence is exact; else there is one probe a sample and solve, keyed by the
sample. An adaptive solver chooses its steps for a whole batch, so that processes agree to its tolerance only.

Source: Grathwohl et al., "FFJORD", 2019, eq. 8; the penalties: Finlay et al., "How to train your neural
ODE", 2020.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.ode_likelihood import Adaptive, Flow, Penalties, Solver, parse_solver
from ..likelihood import Probe, dequantised, probe_of, usual_probe
from ..objective import STRICT, Batch, Tangent

MOST = 2000  # evaluations of a step of training, where the config does not say
ADVICE = (
    "the flow has become stiff, and objective.max_evaluations stops it here. Start again with a lower "
    "optimizer.lr, with penalties (objective.kinetic and objective.jacobian, such as 0.01), or with a larger "
    "tolerance (objective.solver: dopri5:1e-3) or fixed steps (rk4:16); or raise objective.max_evaluations "
    "and go on from the last checkpoint"
)
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class ContinuousFlow:
    """Train a velocity by the likelihood of its flow; `solver` is as in `driftmap likelihood`.

    dopri5 has the gradient of the adjoint equation, heun and rk4 on even steps have autograd's. `pixels`:
    the data are 256 values a channel, and uniform noise fills the gaps between them.
    """

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"
    differentiates_twice: ClassVar[bool] = True

    solver: str = "dopri5:1e-5"
    max_evaluations: Annotated[int, Field(gt=0)] | None = None
    probe: Probe | None = None
    kinetic: Weight = 0.0
    jacobian: Weight = 0.0
    pixels: bool = False
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if not isinstance(self._solver, Adaptive) and self.max_evaluations is not None:
            raise ValueError(
                f"max_evaluations has no effect on {self.solver}, whose steps are counted; remove it"
            )
        return self

    def meaning(self) -> dict[str, Any]:
        """Return what a network becomes: a flow along no path of a form that is known."""
        return {"kind": "continuous_flow"}

    @property
    def _solver(self) -> Solver:
        solver = parse_solver(self.solver)
        if isinstance(solver, Adaptive):
            return replace(solver, max_evaluations=self.max_evaluations or MOST)
        return replace(solver, power=1)

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss in nats a dimension, the nats of a sample, and what the solve took."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        data = dequantised(batch) if self.pixels else batch.data
        probe = probe_of(self.probe or usual_probe(model.sample_shape), batch)
        penalties = Penalties(self.kinetic, self.jacobian)
        flow = Flow(model, batch.condition, probe, self._solver, penalties=penalties, advice=ADVICE)
        found = flow.solve(data, [each for each in model.parameters() if each.requires_grad])
        nats = -found.log_density
        losses = {"nats": nats.mean(), "evaluations": nats.new_tensor(found.evaluations)}
        if self.kinetic or self.jacobian:
            losses["penalty"] = found.penalty.mean() / data[0].numel()
        error = (nats + found.penalty) / data[0].numel()
        return {**losses, "loss": error.mean(), "error": error, "index": batch.random.index}
