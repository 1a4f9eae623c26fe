"""The section `teacher` of a config: a frozen run whose velocity teaches, and how it is guided."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .guiding import RandomScale, Share
from .objective import STRICT


@dataclass(frozen=True, config=STRICT)
class TeacherSection:
    """A frozen run whose velocity teaches; `guidance` 1 is its conditional velocity alone.

    With `weak`, a worse run of its kind, guidance goes away from that one's velocity: autoguidance. A range
    of scales, `{uniform: [1, 4]}`, is for a student that takes the scale as an input (`guidance_input`).
    """

    run: Path
    weak: Path | None = None
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    shard: bool = False  # among the processes of strategy fsdp, as the student is; else every one holds it
    guidance: Annotated[float, Field(ge=0)] | RandomScale = 1.0
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    guidance_rescale: Share = 0.0

    @property
    def drawn(self) -> RandomScale | None:
        """The scales that are drawn, if any are."""
        return self.guidance if isinstance(self.guidance, RandomScale) else None

    @property
    def scale(self) -> float:
        """The scale of guidance, or the largest of those drawn: that of samples that carry none."""
        return self.guidance.uniform[1] if isinstance(self.guidance, RandomScale) else self.guidance
