"""The classifier: cross-entropy of the class given the picture, with pictures shifted at random.

loss = -E log softmax(scores(picture))[class]
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...models.flow_map import Velocity
from ..objective import STRICT, Batch, Tangent


@dataclass(frozen=True, config=STRICT)
class Classifier:
    """Train a classifier whose features an evaluation compares; `max_shift` in pixels, each way."""

    model_kind: ClassVar[str] = "classifier"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    max_shift: Annotated[int, Field(ge=0)] = 2

    def __call__(self, model: nn.Module, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss and the share of wrong answers."""
        if not isinstance(batch.condition, Tensor):
            raise ValueError("the classifier needs class labels: shards with a .cls member a sample")
        scores = model(self._shifted(batch))
        return {
            "loss": F.cross_entropy(scores, batch.condition),
            "error": (scores.argmax(1) != batch.condition).float(),
        }

    def _shifted(self, batch: Batch) -> Tensor:
        """Return the pictures, each moved by a whole number of pixels, edges repeated."""
        m, (height, width) = self.max_shift, batch.data.shape[-2:]
        padded = F.pad(batch.data, (m, m, m, m), mode="replicate")
        down, right = (
            (batch.random.uniform(axis) * (2 * m + 1)).long() for axis in ("shift down", "shift right")
        )
        rows = (down[:, None] + torch.arange(height, device=down.device))[:, None, :, None]
        columns = (right[:, None] + torch.arange(width, device=right.device))[:, None, None, :]
        samples = torch.arange(len(padded), device=down.device)[:, None, None, None]
        channels = torch.arange(padded.shape[1], device=down.device)[None, :, None, None]
        return padded[samples, channels, rows, columns]
