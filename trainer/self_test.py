"""Before a run differentiates forwards, one batch shows that it can: under its strategy, on its device."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.flow_map import FlowMap, Velocity
from ..models.path import expand
from .loop import Task
from .objective import Batch, Tangent
from .strategy import DataParallel
from .tangent import time_derivative

TOLERANCE = 0.05


@dataclass(frozen=True)
class TangentCheck:
    """The relative difference of the forward-mode derivative and a central one, in place of an objective.

    Along a direction in which the state and both times move, so that no network is blind to it. The central
    difference is of fourth order, (8 f(h) - 8 f(-h) - f(2h) + f(-2h)) / 12 h: networks have waves of up to
    1000 radians a unit of time.
    """

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "forward"

    step: float = 5e-4  # longer ones bend with these waves, shorter ones drown in rounding

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return it as `loss`."""
        x, along = batch.data, batch.noise()
        s, t = (batch.random.uniform(name).to(x.dtype) for name in ("check s", "check t"))

        def moved(by: Tensor) -> Tensor:
            return model.mean_velocity(x + expand(by, x) * along, s + by, t - by, batch.condition)

        zero = torch.zeros_like(s)
        value, slope = time_derivative(moved, zero, how="forward")
        near, far = (moved(zero + h) - moved(zero - h) for h in (self.step, 2 * self.step))
        expected = (8 * near - far) / (12 * self.step)
        scale = expected.norm() + 1e-2 * value.norm() + 1e-6
        return {"loss": (slope - expected).norm() / scale}


def check_tangent(strategy: DataParallel, task: Task, samples: dict[str, Tensor]) -> None:
    """Raise RuntimeError where the derivative of the sharded network is not that of a central difference.

    In fp32: differences of half-precision values say nothing. Every process must call.
    """
    if task.precision is not None:
        return
    check: Any = TangentCheck()
    objective, task.objective = task.objective, check
    try:
        with torch.no_grad():
            error = strategy.task(samples)["loss"].item()
    finally:
        task.objective = objective
    if strategy.world.any(not error < TOLERANCE):
        raise RuntimeError(
            f"the forward-mode derivative of this network differs from a central difference by {error:.1%} "
            "on one batch, so it would be trained wrongly; use derivative: finite_difference, another "
            "strategy or attention, and tell us"
        )
