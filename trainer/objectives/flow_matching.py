"""Flow matching: regress the diagonal on the path's velocity.

    loss = E | v(x_t, t, t) - (alpha'(t) data + sigma'(t) noise) |^2,    x_t = alpha(t) data + sigma(t) noise

Source: Lipman et al., "Flow matching for generative modeling", 2023, eq. 9.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.flow_map import FlowMap, Velocity
from ...models.path import Linear
from ..coupling import Coupling, coupled
from ..guiding import SelfGuidance, refuse_guidance
from ..objective import STRICT, Batch, Paths, Tangent, diagonal_error
from ..times import Times, Uniform


@dataclass(frozen=True, config=STRICT)
class FlowMatching:
    """Train a velocity from data, or copy a teacher's velocity where one is given.

    With `coupling` optimal_transport the noise is not independent of the data: the flow is no diffusion, to
    which samplers with noise or another path would apply. See ../coupling.py.
    """

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = True
    tangent: ClassVar[Tangent] = "none"

    path: Paths = Field(default_factory=Linear)
    times: Times = Field(default_factory=Uniform)
    coupling: Coupling = "independent"
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance: SelfGuidance | None = None

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        refuse_guidance(self.guidance, condition_dropout=self.condition_dropout)
        return self

    def uses_target(self, *, taught: bool) -> bool:
        """Return whether a target network would be asked for anything."""
        return self.guidance is not None

    def __call__(
        self,
        model: FlowMap,
        batch: Batch,
        teacher: Velocity | None = None,
        target: FlowMap | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss and the error of each sample at its time."""
        if teacher is not None and self.coupling != "independent":
            raise ValueError(
                f"coupling {self.coupling} leads to other states than the teacher's flow; set it to "
                "independent, or train without a teacher"
            )
        index, batch = batch.random.index, coupled(batch, self.coupling)
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        batch = batch.of_teacher(teacher)
        t = self.times.sample(batch.random).to(batch.data.dtype)
        guide = self.guidance.by(target or model) if self.guidance else None
        error = diagonal_error(model, self.path, batch, t, teacher or guide)
        return {"loss": error.mean(), "error": error, "time": t, "index": index}
