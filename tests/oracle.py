"""The exact flow of Gaussian data, with the interface of our own models: what every loss and sampler is held to.

For data N(m, c^2 I) on the linear path, with S(t)^2 = (1 - t)^2 c^2 + t^2,
    X_{s,t}(x) = (1 - t) m + S(t) / S(s) (x - (1 - s) m)
    b(x, t)    = -m + (t - (1 - t) c^2) / S(t)^2 (x - (1 - t) m).
"""

import torch
from torch import Tensor, nn

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import expand
from driftmap.trainer.objective import Batch
from driftmap.trainer.seeds import Random


class GaussianBackbone(nn.Module):
    """The exact mean velocity (X_{s,t}(x) - x) / (t - s); `wrong` is added to it (a wrong map)."""

    null_label = None

    def __init__(self, *, mean: float = 0.7, std: float = 0.4, wrong: float = 0.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.wrong = nn.Parameter(torch.tensor(wrong, dtype=torch.float64))

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        # (S(t) - S(s)) / (t - s) without the division, so that the diagonal is exact as well:
        # S(t)^2 - S(s)^2 = (t - s) ((t + s) (1 + c^2) - 2 c^2).
        c2 = self.std**2
        slope = ((t + s) * (1 + c2) - 2 * c2) / (self.spread(t) + self.spread(s)) / self.spread(s)
        exact = -self.mean + expand(slope, x) * (x - expand(1 - s, x) * self.mean)
        return exact + self.wrong * (1 + expand(t - s, x) * x)


class SignedTime(GaussianBackbone):
    """A wrong map of another kind: it moves the state the wrong way in time."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return -super().forward(x, s, t, condition)


def gaussian_batch(size: int = 256, *, mean: float = 0.7, std: float = 0.4, dimensions: int = 5) -> Batch:
    """Return fp64 samples of N(mean, std^2 I) with positions 0 .. size - 1."""
    random = Random(3, torch.arange(size))
    data = mean + std * random.normal("data", (dimensions,)).double()
    return Batch(data, None, random)


def exact(**settings: float) -> FlowMap:
    return FlowMap(GaussianBackbone(**settings))
