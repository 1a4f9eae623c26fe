"""What a network predicts and how that becomes a velocity; guidance on top of any velocity."""

import torch
from torch import Tensor, nn

from .flow_map import Velocity
from .path import Path, Prediction, expand


class Denoiser(nn.Module):
    """The velocity of a one-time network that predicts data, noise or velocity along a path."""

    def __init__(self, network: nn.Module, path: Path, *, prediction: Prediction) -> None:
        super().__init__()
        self.network = network
        self.path = path
        self.prediction: Prediction = prediction

    def end_points(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the posterior means (data, noise) given x_t = x; legal times: see `Path.end_points`."""
        return self.path.end_points(x, self.network(x, t, t, condition), t, kind=self.prediction)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return dx/dt = alpha' E[data | x] + sigma' E[noise | x]."""
        return self.path.velocity(*self.end_points(x, t, condition), t)


class Guided:
    """Classifier-free guidance: b_null + scale (b_condition - b_null) inside `interval`, b_condition outside.

    Costs two evaluations of the velocity. Source: Ho and Salimans, 2022, eq. 6; the interval: Kynkaanniemi et
    al., 2024.
    """

    evaluations = 2

    def __init__(
        self,
        inner: Velocity,
        scale: float,
        *,
        null_condition: int,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.inner = inner
        self.scale = scale
        self.null_condition = null_condition
        self.interval = interval

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the guided velocity (B, ...) for labels `condition` (B,)."""
        if condition is None:
            raise ValueError("guidance needs a condition: give class labels, or set guidance to 1")
        null = torch.full_like(condition, self.null_condition)
        both = self.inner.velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        conditional, unconditional = both.chunk(2)
        low, high = self.interval
        inside = ((t >= low) & (t <= high)).to(x.dtype)
        scale = expand(1 + (self.scale - 1) * inside, x)
        return unconditional + scale * (conditional - unconditional)


class InBf16:
    """A velocity whose network has bf16 weights, between states of any precision."""

    def __init__(self, inner: Velocity) -> None:
        self.inner = inner

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return dx/dt (B, ...) in the precision of x (B, ...)."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.inner.velocity(x, t, condition).to(x.dtype)
