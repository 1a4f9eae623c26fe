"""The autoencoder: reconstruct pictures from a sampled posterior that is kept near a standard normal.

    loss = E [ |x - D(mean + std n)|_p^p / dim(x) + kl_weight * KL( N(mean, std^2) || N(0, I) ) / dim(z) ]

Both terms are means over their own dimensions, so the weight does not change with the picture's size.

Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014, eq. 10; Rombach et al., 2022, section
3.1.
"""

from typing import Annotated, ClassVar, Literal

from diffusers import AutoencoderKL
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.autoencoder import decode, posterior
from ...models.flow_map import Velocity
from ..objective import STRICT, Batch, Tangent


@dataclass(frozen=True, config=STRICT)
class Autoencoder:
    """Train a KL autoencoder on pixels in [-1, 1]."""

    model_kind: ClassVar[str] = "autoencoder"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    kl_weight: Annotated[float, Field(ge=0)] = 1e-3
    reconstruction: Literal["absolute", "square"] = "absolute"

    def __call__(
        self, model: AutoencoderKL, batch: Batch, teacher: Velocity | None = None
    ) -> dict[str, Tensor]:
        """Return the loss, the reconstruction error and the divergence of each sample."""
        gaussian = posterior(model, batch.data)
        normal = batch.random.normal("posterior", tuple(gaussian.mean.shape[1:]))
        latents = gaussian.mean + gaussian.std * normal.to(gaussian.mean.dtype)
        residual = (decode(model, latents) - batch.data).flatten(1)
        error = (residual.abs() if self.reconstruction == "absolute" else residual.square()).mean(1)
        divergence = gaussian.kl() / latents[0].numel()
        return {
            "loss": (error + self.kl_weight * divergence).mean(),
            "error": error,
            "index": batch.random.index,
            "divergence": divergence,
        }
