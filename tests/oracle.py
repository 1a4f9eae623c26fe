"""The exact flow of Gaussian data, with our models' interface: what every loss and sampler is held to.

For data N(m, c^2 I) on a path (alpha, sigma), with S^2 = alpha^2 c^2 + sigma^2,
    X_{s,t}(x) = alpha(t) m + S(t) / S(s) (x - alpha(s) m).
Nothing here is taken from models/path.py, so that a wrong sign there is seen. With c = 0 the data are a
point, and the conditional velocity is the marginal one.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Path, Prediction, Trig, expand
from driftmap.models.schedule import Cosine, LinearBetas, ScaledLinearBetas
from driftmap.trainer.objective import Batch
from driftmap.trainer.seeds import Random

CLASS_MEANS = (-0.6, 1.1)
PATHS: dict[str, Path] = {
    "line": Linear(),
    "quarter circle": Trig(),
    "linear betas": LinearBetas(),
    "cosine": Cosine(),
    "zero terminal": ScaledLinearBetas(zero_terminal_snr=True),
}


class GaussianBackbone(nn.Module):
    """The exact mean velocity (X_{s,t}(x) - x) / (t - s), without the division: exact on the diagonal too.

    Class i has the mean CLASS_MEANS[i]; the null label and a missing condition have `mean`.
    """

    sample_shape = (5,)
    null_label = len(CLASS_MEANS)

    def __init__(
        self, *, mean: float = 0.7, std: float = 0.4, path: Literal["linear", "trig"] = "linear"
    ) -> None:
        super().__init__()
        self.mean, self.std, self.path = mean, std, path

    def means(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the mean of the data of each sample, (B, 1)."""
        if condition is None:
            return torch.full_like(x[:, :1], self.mean)
        return torch.tensor([*CLASS_MEANS, self.mean], dtype=x.dtype)[condition, None]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and S at t."""
        if self.path == "linear":
            alpha, sigma = 1 - t, t
        else:
            alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
        return alpha, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def slopes(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha(t) - alpha(s)) / (t - s) and (S(t)^2 - S(s)^2) / (t - s), divided by hand."""
        c2 = self.std**2
        if self.path == "linear":
            return -torch.ones_like(s), (t + s) * (1 + c2) - 2 * c2
        quarter, half = math.pi / 4, math.pi / 2
        alpha_slope = -half * (quarter * (t + s)).sin() * torch.sinc((t - s) / 4)
        return alpha_slope, half * (1 - c2) * (half * (t + s)).sin() * torch.sinc((t - s) / 2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        s, t, m = s[:, None], t[:, None], self.means(x, condition)
        (alpha, spread), (_, later) = self.coefficients(s), self.coefficients(t)
        alpha_slope, square_slope = self.slopes(s, t)
        return alpha_slope * m + square_slope / (later + spread) / spread * (x - alpha * m)


class Shifted(GaussianBackbone):
    """Wrong by a smooth error, on the diagonal as well."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t, condition) + 0.1 * (1 + (t - s)[:, None] * x)


class Reversed(GaussianBackbone):
    """Moves the state the wrong way."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return -super().forward(x, s, t, condition)


class Hurried(GaussianBackbone):
    """Arrives where the flow is at t^2."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t**2, condition)


class Blind(GaussianBackbone):
    """Ignores the target time: a student at birth, right on the diagonal and wrong elsewhere."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, s, condition)


class Wavy(Blind):
    """Ignores the target time, and errs by waves over states and times."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t, condition) + 0.2 * (3 * s).sin()[:, None] * x**2


class LateError(GaussianBackbone):
    """Wrong by one for sources after 0.5, exact before."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t, condition) + (s > 0.5).to(x.dtype)[:, None]


class Recording(GaussianBackbone):
    """Exact, and keeps the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        self.calls.append((x, s, t, condition))
        return super().forward(x, s, t, condition)


class Posterior(nn.Module):
    """The exact posterior means of data N(mean, std^2) given x_t, as a one-time network of any prediction."""

    sample_shape = (5,)
    null_label = None

    def __init__(
        self,
        path: Path,
        prediction: Prediction,
        *,
        data_std: float = 1.0,
        mean: float = 0.7,
        std: float = 0.4,
    ) -> None:
        super().__init__()
        self.path, self.prediction, self.data_std, self.mean, self.std = path, prediction, data_std, mean, std

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction at x_s = x; for v, x comes at unit variance."""
        alpha, sigma = expand(self.path.alpha(s), x), expand(self.path.sigma(s), x)
        r = ((alpha * self.data_std) ** 2 + sigma**2).sqrt()
        x = x * r if self.prediction == "v" else x
        centred = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        data, noise = self.mean + alpha * self.std**2 * centred, sigma * centred
        velocity = expand(self.path.alpha_dot(s), x) * data + expand(self.path.sigma_dot(s), x) * noise
        v = (alpha * self.data_std * noise - sigma * data / self.data_std) / r
        return {"data": data, "noise": noise, "velocity": velocity, "v": v}[self.prediction]


def carried(x: Tensor, path: Path, s: Tensor, t: Tensor, *, mean: float = 0.7, std: float = 0.4) -> Tensor:
    """Return the exact flow of N(mean, std^2) along a path, from x at s to t, both ()."""

    def spread(time: Tensor) -> Tensor:
        return ((path.alpha(time) * std) ** 2 + path.sigma(time) ** 2).sqrt()

    return path.alpha(t) * mean + spread(t) / spread(s) * (x - path.alpha(s) * mean)


def gaussian_batch(
    size: int = 256, *, mean: float = 0.7, std: float = 0.4, dimensions: int = 5, labels: bool = False
) -> Batch:
    """Return fp64 samples of N(mean, std^2 I), or of the classes in turn, with positions 0 .. size - 1."""
    random = Random(3, torch.arange(size))
    condition = torch.arange(size) % len(CLASS_MEANS) if labels else None
    centres = torch.tensor([mean] if condition is None else CLASS_MEANS, dtype=torch.float64)
    means = centres[torch.zeros_like(random.index) if condition is None else condition]
    data = means[:, None] + std * random.normal("data", (dimensions,)).double()
    return Batch(data, condition, random)


def exact(*, mean: float = 0.7, std: float = 0.4, path: Literal["linear", "trig"] = "linear") -> FlowMap:
    """Return the exact flow map."""
    return FlowMap(GaussianBackbone(mean=mean, std=std, path=path))


class Offset(FlowMap):
    """A flow map plus a number for each element of v, whose gradient tells the residual there."""

    def __init__(self, inner: FlowMap, like: Tensor) -> None:
        super().__init__(inner.backbone, inner.path)
        self.inner, self.offset = inner, nn.Parameter(torch.zeros_like(like))

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return v(x, s, t) (B, 5)."""
        return self.inner.mean_velocity(x, s, t, condition) + self.offset[: len(x)]


def pull(rule: Any, batch: Batch, teacher: Any = None, *, of: FlowMap | None = None) -> Tensor:
    """Return what a semigradient of jumps alone pulls each element of v by (B, 5): its residual.

    The map, `of` or a wrong one, is one that jumps and velocities, x and times all tell from the exact one.
    """
    model = Offset(of or FlowMap(Wavy(path=rule.path.name)), batch.data)
    (gradient,) = torch.autograd.grad(rule(model, batch, teacher)["loss"], [model.offset])
    return gradient * (gradient.numel() / 2)
