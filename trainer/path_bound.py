"""The bound of a DiffFlow from whole paths that are simulated, of one or several a sample.

    bound      -E[w], w the weight of a path (models/path_weight.py)
    iw_bound   -log( (w_1 + .. + w_K) / K ) with w on a linear scale: the tighter the larger K

Pixels are dequantised by uniform noise, as for the density of a flow.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..models.bound import importance_weighted
from ..models.diffflow import DiffFlow
from ..models.path_weight import path_weight
from .likelihood import PIXEL_SCALE, UNIFORM, dequantised
from .measuring import Estimate
from .objective import Batch
from .objectives.diffflow import noise_of_path


@dataclass(frozen=True, eq=False)
class PathBound:
    """The bound of the chain of `num_steps` steps, from `trajectories` paths a sample."""

    model: DiffFlow
    num_steps: int
    trajectories: int = 1
    pixels: bool = False
    key: ClassVar[str] = "bound_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know of the chain."""
        return {
            "N": self.num_steps,
            "K": self.trajectories,
            "terms_computed": "those of whole paths, simulated",
            "dequantisation": UNIFORM if self.pixels else "none: the data are continuous",
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Estimate:
        """Return the bound of each sample."""
        data = dequantised(batch) if self.pixels else batch.data
        grid = self.model.grid(self.num_steps)
        weights = []
        for number in range(self.trajectories):
            noise = noise_of_path(batch, self.num_steps, path=f" of trajectory {number}")
            weights.append(path_weight(self.model, data, grid, noise, batch.condition)[0])
        nats = importance_weighted(torch.stack(weights))
        if self.pixels:
            nats = nats + math.log(PIXEL_SCALE) * data[0].numel()
        return Estimate(nats, self.trajectories * (self.num_steps + 1), {})


@dataclass(frozen=True, eq=False)
class WeightedPathBound(PathBound):
    """The same from several paths, under a key of its own."""

    key: ClassVar[str] = "iw_bound_bits_per_dim"
