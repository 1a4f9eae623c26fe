"""A discrete flow of coupling layers, by zuko: an exact density and its samples, but no velocity.

    z = f(x),   log p(x) = log N(f(x); 0, I) + log |det df/dx|

Each layer moves every other dimension by a function of the rest, which takes turns: an affine one (RealNVP),
or a monotone rational-quadratic spline on [-5, 5] (a neural spline flow; beyond it the spline is the
identity, so data should be near unit scale).

Sources: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", 2017; Durkan et al., "Neural
spline flows", 2019.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bound import gaussian


class CouplingFlow(nn.Module):
    """A density of vectors (B, channels), with an optional class; the label `num_classes` is no class."""

    kind = "discrete_flow"

    def __init__(
        self,
        *,
        channels: int = 2,
        transform: Literal["affine", "spline"] = "affine",
        layers: int = 8,
        width: int = 128,
        depth: int = 2,
        bins: int = 8,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels is {channels}; a coupling layer splits 2 or more")
        if transform == "affine" and bins != 8:
            raise ValueError(f"bins is {bins}, but only splines have some; set transform to spline")
        labels = 16 if num_classes else 0
        with torch.device("cpu"):  # zuko (1.6) reads its masks, which the device `meta` does not let it
            flow = _zuko().flows.NICE(
                channels,
                labels,
                transforms=layers,
                hidden_features=(width,) * depth,
                **_univariate(transform, bins),
            )
        self.flow = flow.to(torch.get_default_device())
        self.labels = nn.Embedding(num_classes + 1, labels) if num_classes else None
        self.sample_shape = (channels,)
        self.null_condition = num_classes or None

    def log_density(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return log p(x) (B,) in nats, of states (B, channels)."""
        z, log_volume = self._transform(x, condition).call_and_ladj(x)
        return gaussian(z, torch.zeros_like(z), torch.ones_like(log_volume)) + log_volume

    def samples(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return samples f^-1(noise) (B, channels) of standard normal noise."""
        return self._transform(noise, condition).inv(noise)

    def _transform(self, like: Tensor, condition: Tensor | None) -> Any:
        """Return f for the classes (B,) of a batch."""
        if self.labels is None:
            return self.flow(None).transform
        missing = torch.full((len(like),), self.labels.num_embeddings - 1, device=like.device)
        return self.flow(self.labels(missing if condition is None else condition)).transform


def _univariate(transform: str, bins: int) -> dict[str, Any]:
    """Return what moves one dimension, and the shapes of its parameters; zuko's own is affine."""
    if transform == "affine":
        return {}
    spline = partial(_zuko().transforms.MonotonicRQSTransform, slope=1e-3)
    return {"univariate": spline, "shapes": [(bins,), (bins,), (bins - 1,)]}


def _zuko() -> Any:
    try:
        import zuko
    except ImportError as error:
        raise ValueError(
            "model.name: coupling_flow is made of zuko, which is not installed; pip install 'driftmap[flows]'"
        ) from error
    return zuko
