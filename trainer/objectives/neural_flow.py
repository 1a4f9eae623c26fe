"""Neural flow diffusion: a generator together with the process that it reverses, by the bound, unsimulated.

    loss = E_t |b(x_t, t, data) - b(x_t, t, predicted)|^2 / (2 g(t)^2) / D,    t uniform,

D the number of dimensions: the part of the bound on -log p(data) that depends on what is learned, in nats a
dimension. The other parts are constants here; `bound` is logged with them. See ../../models/neural_flow.py
for the process and the bound; with `transform: null` it is a variational diffusion model.

The times of a batch, over all processes and micro steps, are evenly spaced, and shifted by one number that
each optimizer step draws: their mean varies little, and each alone is uniform.

Sources: Bartosh, Vetrov and Naesseth, "Neural flow diffusion models", 2024; times: Kingma et al.,
"Variational diffusion models", 2021, appendix I.1.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import Velocity
from ...models.neural_flow import LearnedFlow
from ...models.path import LogLinear
from ..objective import STRICT, Batch, Tangent
from ..seeds import Random

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class TransformNetwork:
    """The small network of the process: `depth` hidden layers, `order` polynomials in time."""

    order: Count = 3
    width: Count = 64
    depth: Count = 2


@dataclass(frozen=True, config=STRICT)
class NeuralFlow:
    """Train a backbone, which predicts the data, and a process; `data_std` is the spread of the data."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    path: LogLinear = Field(default_factory=LogLinear)
    transform: TransformNetwork | None = Field(default_factory=TransformNetwork)
    volatility: Literal["tied", "learned"] = "tied"
    least_volatility: Annotated[float, Field(gt=0)] = 1e-3
    data_std: Annotated[float, Field(gt=0)] = 1.0
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    def meaning(self) -> dict[str, Any]:
        """Return what makes a model of a backbone."""
        settings = TypeAdapter(NeuralFlow).dump_python(self, mode="json")
        del settings["condition_dropout"]
        return {"kind": "neural_flow", **settings}

    def __call__(
        self, model: LearnedFlow, batch: Batch, teacher: Velocity | None = None
    ) -> dict[str, Tensor]:
        """Return the loss, the bound, both in nats a dimension, and the errors of the data predicted."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        t = times(batch)
        nats, error = model.path_term(batch.data, batch.noise(), t, batch.condition)
        nats = nats / batch.data[0].numel()
        # In expectation L_1 is 0 and L_0 the entropy of the least noise.
        least = math.log(2 * math.pi * math.e * self.path.least**2) / 2
        return {
            "loss": nats.mean(),
            "bound": nats.mean().detach() + least,
            "error": error,
            "time": t,
            "index": batch.random.index,
        }


def times(batch: Batch) -> Tensor:
    """Return the times (B,) of samples in float64, functions of their positions."""
    number = batch.step.floor()
    shift = Random(batch.random.seed, number.long()).uniform("shift of times").double()
    return (batch.step - number + shift) % 1
