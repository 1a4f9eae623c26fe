"""A discrete flow, trained by the exact likelihood of data.

loss = E[ -log p(data) ] / d, the density of models/backbones/coupling_flow.py

Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", 2017, eq. 2.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.backbones.coupling_flow import CouplingFlow
from ...models.flow_map import Velocity
from ..objective import STRICT, Batch, Tangent


@dataclass(frozen=True, config=STRICT)
class DiscreteFlow:
    """Train a density that has no velocity: it can be neither a teacher nor a student."""

    model_kind: ClassVar[str] = "discrete_flow"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __call__(
        self, model: CouplingFlow, batch: Batch, teacher: Velocity | None = None
    ) -> dict[str, Tensor]:
        """Return the loss in nats a dimension, and the nats of a sample."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        assert batch.condition is None or isinstance(batch.condition, Tensor)
        nats = -model.log_density(batch.data, batch.condition)
        error = nats / batch.data[0].numel()
        return {"loss": error.mean(), "nats": nats.mean(), "error": error, "index": batch.random.index}
