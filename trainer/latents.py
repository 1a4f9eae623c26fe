"""From what the loader gives to what an objective sees: keyed draws of the posterior, of unit variance."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.decode import floats
from ..models.condition import Scaled, Text
from .guiding import RandomScale
from .objective import Batch, States
from .recipe import Recipe
from .seeds import Random


@dataclass(frozen=True)
class Preparation:
    """Turn loaded samples into a `Batch` on a device.

    Latent shards hold the mean and std of the autoencoder's posterior; a fresh draw (mean + std n - shift)
    * scale is made at every visit, with n keyed by the sample's position. Pictures and points pass as they
    are.
    """

    seed: int
    device: torch.device
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    batch_size: int | None = None  # of an optimizer step, which tells a sample's step; see `Batch`
    guidance: RandomScale | None = None  # the scales that conditions are to carry

    @classmethod
    def of(
        cls, info: dict[str, Any], *, seed: int, device: torch.device, batch_size: int | None = None
    ) -> "Preparation":
        """Return the preparation for a shard set with this `info` (its `latents`, if it holds any)."""
        latents = info.get("latents", {})
        scaling, shift = latents.get("scaling_factor", 1.0), latents.get("shift_factor", 0.0)
        return cls(seed, device, scaling, shift, batch_size)

    @classmethod
    def of_recipe(cls, recipe: Recipe, info: dict[str, Any], device: torch.device) -> "Preparation":
        """Return the preparation for the training of a recipe on a shard set with this `info`."""
        plain = cls.of(info, seed=recipe.seed, device=device, batch_size=recipe.data.batch_size)
        return replace(plain, guidance=recipe.teacher.drawn if recipe.teacher else None)

    def __call__(self, samples: dict[str, Tensor]) -> Batch:
        """Return the batch of `data`, or `mean` and `std`, (B, ...), and `index` (B,).

        With the data there may be `states` (B, K + 1, ...) at `times` (B, K + 1) of the flow to them.
        Its condition is `text` (B, L, D) with `text_mask` (B, L), or `label` (B,).
        """
        moved = {name: value.to(self.device, non_blocking=True) for name, value in samples.items()}
        random = Random(self.seed, moved["index"])
        condition = condition_of(moved)
        if self.guidance is not None:
            condition = Scaled(condition, self.guidance.sample(random))
        if "mean" not in moved:
            states = States(floats(moved["states"]), moved["times"].float()) if "states" in moved else None
            return Batch(floats(moved["data"]), condition, random, self.batch_size, states)
        mean = floats(moved["mean"])
        drawn = mean + floats(moved["std"]) * random.normal("posterior", tuple(mean.shape[1:]))
        return Batch((drawn - self.shift_factor) * self.scaling_factor, condition, random, self.batch_size)


def condition_of(samples: dict[str, Tensor]) -> Tensor | Text | None:
    """Return what labels loaded samples: captions, or classes, or nothing."""
    if "text" in samples:
        return Text(floats(samples["text"]), samples["text_mask"])
    return samples.get("label")
