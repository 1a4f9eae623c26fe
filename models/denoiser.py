"""What a network predicts and how that becomes a velocity; guidance on top of any velocity."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .condition import Condition, Nothing, joined, parted, silenced
from .flow_map import FlowMap, Process, Velocity
from .path import Path, Prediction, expand


class Denoiser(FlowMap):
    """A flow map whose network predicts data, noise, velocity or v along a path, of data of spread data_std.

    The end points (data, noise) that a prediction means give the jump X_{s,t}(x) = alpha(t) data + sigma(t)
    noise, DDIM's step: X_{s,s}(x) = x, and its diagonal is alpha' data + sigma' noise, the velocity. So a
    diffusion model is a teacher, and a student that starts from one is a flow map at once.

    The network is told times in [0, 1], as EDM, too: its c_noise is log(sigma / alpha) / 4, and on the linear
    path t is the logistic function of that logarithm.

    Source: Song, Meng and Ermon, "Denoising diffusion implicit models", 2021, eq. 12 without noise.
    """

    def __init__(
        self, backbone: nn.Module, path: Path, *, prediction: Prediction, data_std: float = 1.0
    ) -> None:
        super().__init__(backbone, path)
        self.prediction: Prediction = prediction
        self.data_std = data_std

    def predict(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return what the network says of x_s = x for a jump to t; for v it sees x at unit variance.

        Of a learned variance it says as many channels more: f in [-1, 1], see the objective ddpm.
        """
        if self.prediction == "v":
            x = x / expand(self.path.scale(s, data_std=self.data_std), x)
        return super().predict(x, s, t, condition)

    def end_points(
        self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (data, noise) that the prediction for a jump to t means at x_s; posterior means at t = s."""
        said = self.predict(x, s, t, condition)[:, : x.shape[1]]  # after that, a learned variance
        return self.path.end_points(x, said, s, kind=self.prediction, data_std=self.data_std)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dx/dt = alpha' E[data | x] + sigma' E[noise | x]."""
        return self.path.velocity(*self.end_points(x, t, t, condition), t)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return ((alpha(t) - alpha(s)) data + (sigma(t) - sigma(s)) noise) / (t - s), its limit at t = s."""
        data, noise = self.end_points(x, s, t, condition)
        of_data, of_noise = (expand(slope.to(x.dtype), x) for slope in self._slopes(s.double(), t.double()))
        return of_data * data + of_noise * noise

    def _slopes(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean slopes (B,) of alpha and sigma between s and t, in float64."""
        path, apart = self.path, (t - s).abs() > 1e-6
        gap = torch.where(apart, t - s, 1.0)
        alpha = torch.where(apart, (path.alpha(t) - path.alpha(s)) / gap, path.alpha_dot(t))
        sigma = torch.where(apart, (path.sigma(t) - path.sigma(s)) / gap, path.sigma_dot(t))
        return alpha, sigma


def learned_log_variance(f: Tensor, large: Tensor, small: Tensor) -> Tensor:
    """Return (1 + f) / 2 log(large) + (1 - f) / 2 log(small): for f in [-1, 1] between the two variances.

    Source: Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 15.
    """
    return (1 + f) / 2 * large.log() + (1 - f) / 2 * small.log()


def mixed(
    strong: Tensor, weak: Tensor, t: Tensor, *, scale: float | Tensor, interval: tuple[float, float]
) -> Tensor:
    """Return weak + scale (strong - weak) (B, ...) at times t (B,) inside `interval`, strong outside.

    The scale is one for all samples, or (B,).
    """
    if isinstance(scale, Tensor):
        scale = scale.to(strong.dtype)
    low, high = interval
    inside = ((t >= low) & (t <= high)).to(strong.dtype)
    return weak + expand(1 + (scale - 1) * inside, strong) * (strong - weak)


class Guided:
    """Classifier-free guidance: b_null + scale (b_condition - b_null) inside `interval`, b_condition outside.

    A scale that the condition carries goes before `scale`. Costs two evaluations of the velocity. Source: Ho
    and Salimans, 2022, eq. 6; the interval: Kynkaanniemi et al., 2024.
    """

    evaluations = 2

    def __init__(
        self,
        inner: Velocity,
        scale: float,
        *,
        null_condition: Nothing,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.inner = inner
        self.scale = scale
        self.null_condition = null_condition
        self.interval = interval

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the guided velocity (B, ...) for class labels or captions."""
        _, scale = parted(condition, self.scale)
        return mixed(*self.both(x, t, condition), t, scale=scale, interval=self.interval)

    def both(self, x: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """Return the velocities (B, ...) with the condition and without."""
        alone, _ = parted(condition, self.scale)
        if alone is None:
            raise ValueError("guidance needs a condition: give class labels, or set guidance to 1")
        everywhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
        null = silenced(alone, everywhere, nothing=self.null_condition)
        both = self.inner.velocity(torch.cat([x, x]), torch.cat([t, t]), joined(alone, null))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional


class InBf16:
    """A velocity whose network has bf16 weights, between states of any precision."""

    def __init__(self, inner: Velocity) -> None:
        self.inner = inner

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dx/dt (B, ...) in the precision of x (B, ...)."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.inner.velocity(x, t, condition).to(x.dtype)


class InProcess:
    """A velocity, guided or in another precision, with the process of the model that it is of."""

    def __init__(self, inner: Velocity, process: Process) -> None:
        self.inner, self.process = inner, process
        self.evaluations = getattr(inner, "evaluations", 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dx/dt (B, ...)."""
        return self.inner.velocity(x, t, condition)

    def state(
        self,
        data: Tensor,
        t: Tensor,
        *,
        draw: Callable[[str], Tensor],
        condition: Condition | None = None,
    ) -> Tensor:
        """Return x_t (B, ...) of the model's process."""
        return self.process.state(data, t, draw=draw, condition=condition)


class Along:
    """A velocity of one path, seen along another.

    The times are matched by the angle atan(sigma / alpha) and the states by their scale: posterior means of
    data and noise do not change under either. Where the other path has more noise than its own ends with, the
    mean of the data is taken to be what it is there. Source: Karras et al., 2022, eqs. 2 and 4.
    """

    def __init__(self, inner: Velocity, own: Path, path: Path) -> None:
        self.inner, self.own, self.path = inner, own, path
        self.evaluations = getattr(inner, "evaluations", 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dx/dt (B, ...) along `path`."""
        angle = self.path.angle(t)
        own = self.own.time(angle)
        scaled = x * expand(self.own.scale(own) / self.path.scale(t), x)
        said = self.inner.velocity(scaled, own, condition)
        data, noise = self.own.end_points(scaled, said, own, kind="velocity")
        beyond = expand(angle > self.own.angle(torch.ones_like(t)) + 1e-6, x)
        rest = (x - expand(self.path.alpha(t), x) * data) / expand(self.path.sigma(t).clamp(min=1e-6), x)
        return self.path.velocity(data, torch.where(beyond, rest, noise), t)
