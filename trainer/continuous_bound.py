"""The bound of a learned forward process, an integral over continuous time, from times that are drawn.

    -log p(x) <= L_N + L_between + L_0
    L_between = (1 / M) sum_i integrand(t_i),   t_i in [(i - 1) / M, i / M),   i = 1 .. M

with one time in each of M parts, so that the mean over noise and times is the bound itself. See
models/neural_flow.py. There is no chain behind it: no number of steps, and no importance weights of its
paths.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.bound import discretised_gaussian
from ..models.neural_flow import LearnedFlow
from .measuring import Estimate
from .objective import Batch


@dataclass(frozen=True, eq=False)
class ContinuousBound:
    """The bound from `num_times` drawn times a sample.

    p(data | x_0) is a Gaussian of the process's least noise; of pixels u / 127.5 - 1 the share of it in each
    value's bin.
    """

    model: LearnedFlow
    num_times: int
    pixels: bool = False
    key: ClassVar[str] = "bound_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know."""
        pixels = "none: the decoder gives probabilities of the 256 values"
        return {
            "N": None,
            "K": 1,
            "decoder": "discretised" if self.pixels else "gaussian",
            "terms_computed": f"{self.num_times} drawn times a sample, of a continuous process",
            "dequantisation": pixels if self.pixels else "none: the data are continuous",
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Estimate:
        """Return the bound of each sample and the sums of its parts."""
        data, random, shape = batch.data, batch.random, tuple(batch.data.shape[1:])
        prior = self.model.prior_term(data)
        decoding = self._data_term(data, random.normal("bound noise 0", shape))
        between = torch.zeros_like(prior)
        for part in range(self.num_times):
            t = (part + random.uniform(f"time {part + 1}").double()) / self.num_times
            noise = random.normal(f"bound noise {part + 1}", shape).to(data.dtype)
            nats, _ = self.model.path_term(data, noise, t, batch.condition)
            between += nats.double() / self.num_times
        sums = {"L_N": prior.sum(), "L_between": between.sum(), "L_0": decoding.sum()}
        return Estimate(prior + between + decoding, self.num_times, sums)

    def _data_term(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return -log p(data | x_0) (B,)."""
        if not self.pixels:
            return self.model.data_term(data, noise)
        least = torch.tensor(self.model.path.least, dtype=torch.float64, device=data.device)
        return -discretised_gaussian(data, data.double() + least * noise, least)
