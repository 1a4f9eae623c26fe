"""DDPM and its relatives: predict noise, data, velocity or v at a noise level drawn at random.

    loss = E_t [ w(t) |noise - predicted noise|^2 ],   x_t = alpha(t) data + sigma(t) noise

- `{}`: DDPM with L_simple; `weighting: {name: bound}`: its bound L.
- `{path: {name: cosine}, prediction: v}`: v at cosine noise levels.
- `{path: {name: linear}, prediction: v, data_std: 0.5, times: {name: logit_normal, mean: -1.2, std: 1.2}}`:
  EDM. Its sigma is t / (1 - t), its preconditioning is the prediction of v (models/path.py), its weights are
  1 on that, and its log-normal sigma are logit-normal times.
On a path of N discrete steps all times are rounded up to a step.

With `importance_sampling` times are drawn in proportion to the weight on v, which is then divided out: the
same loss in expectation. For Gaussian data of spread `data_std` the error of v is 1 at all times, and the
loss of a sample would not vary with its time at all. Nothing is measured on the way, so a run goes on
exactly.

With `variance: learned` the network says f as well, in as many channels more; the variance of a chain's step
is beta^((1 + f) / 2) var~^((1 - f) / 2), with var~ that of q(x_{n-1} | x_n, data). It is trained by
`bound_share` times the bound, of which nothing flows back into the prediction.

Sources: Ho et al., "Denoising diffusion probabilistic models", 2020, eqs. 12 and 14; Karras et al., 2022, eq.
8; importance sampling: Song et al., "Maximum likelihood training of score-based diffusion models", 2021;
learned variances: Nichol and Dhariwal, 2021, eqs. 15 and 16.
"""

import math
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.denoiser import learned_log_variance
from ...models.flow_map import FlowMap, Velocity
from ...models.path import Prediction, expand
from ...models.schedule import Discrete, LinearBetas
from ..objective import STRICT, Batch, Paths, Tangent, mean_square
from ..seeds import Random
from ..times import Times, Uniform
from ..weighting import OVER_UNIFORM_TIMES, Bound, Flat, Weighting

CELLS = 1000  # of time, for importance sampling on a continuous path


@dataclass(frozen=True, config=STRICT)
class Ddpm:
    """Train a denoiser from data; `data_std` is the spread of the data that v is scaled by."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    path: Paths = Field(default_factory=LinearBetas)
    prediction: Prediction = "noise"
    data_std: Annotated[float, Field(gt=0)] = 1.0
    weighting: Weighting = Field(default_factory=Flat)
    times: Times = Field(default_factory=Uniform)
    importance_sampling: bool = False
    variance: Literal["fixed", "learned"] = "fixed"
    bound_share: Annotated[float, Field(gt=0)] | None = None  # with a learned variance; None: 1e-3
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _has_effect_and_meaning(self) -> Self:
        if self.data_std != 1 and self.prediction != "v":
            raise ValueError(
                f"data_std has no effect on prediction {self.prediction}; remove it, or predict v"
            )
        if self.prediction == "noise" and self.path.alpha(torch.ones(1).double()).abs() < 1e-8:
            raise ValueError(
                "this path ends in pure noise, where a prediction of the noise says nothing of the data; "
                "set prediction to v or data, or take a path that keeps some signal, such as linear_betas"
            )
        even = self.times == Uniform()
        if isinstance(self.weighting, OVER_UNIFORM_TIMES) and not even:
            raise ValueError(
                f"weighting {self.weighting.name} is an integral over uniform times, and other times would "
                "weight it again; remove times, and set importance_sampling to true for less noise"
            )
        if self.importance_sampling and (not even or isinstance(self.weighting, Flat)):
            raise ValueError(
                "importance_sampling draws times by the weighting: it needs one besides prediction, and no "
                "times"
            )
        if isinstance(self.weighting, Bound) and self.weighting.variance and not self._steps:
            raise ValueError("weighting.variance has no effect on a path that is not discrete; remove it")
        if self.variance == "learned" and (not self._steps or not even or self.importance_sampling):
            raise ValueError(
                "variance learned is trained by the bound of a chain: it needs a discrete path, such as "
                "linear_betas, uniform times and no importance_sampling"
            )
        if self.bound_share is not None and self.variance != "learned":
            raise ValueError(
                "bound_share has no effect on a fixed variance; remove it, or set variance to learned"
            )
        return self

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss and the unweighted error of each sample's prediction at its time."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        precise, weight = self.draw(batch.random)
        t, noise = precise.to(batch.data.dtype), batch.noise()
        target = self.path.target(batch.data, noise, t, kind=self.prediction, data_std=self.data_std)
        said = model.predict(self.path.state(batch.data, noise, t), t, t, batch.condition)
        prediction, f = said[:, : target.shape[1]], said[:, target.shape[1] :]
        error = mean_square(prediction - target)
        losses = {"loss": (weight.to(error.dtype) * error).mean(), "error": error, "time": t}
        if self.variance == "learned":
            state = self.path.state(batch.data, noise, t)
            kind, std = self.prediction, self.data_std
            data, _ = self.path.end_points(state, prediction.detach(), t, kind=kind, data_std=std)
            bound = self.bound(batch.data - data, f, precise)
            losses |= {"loss": losses["loss"] + (self.bound_share or 1e-3) * bound.mean(), "bound": bound}
        return {**losses, "index": batch.random.index}

    def bound(self, error: Tensor, f: Tensor, t: Tensor) -> Tensor:
        """Return the bound's term at steps t (B,), times their number, in nats a dimension (B,).

        `error` (B, ...) is that of the data predicted; f (B, ...) says the variance. The last step's term is
        -log p(data | x_1) with p a Gaussian.
        """
        path = self.path
        assert isinstance(path, Discrete)
        n = (t * path.num_steps).round().long() - 1
        levels = torch.cat([torch.ones(1, dtype=torch.float64), path.alpha_bar]).to(t.device)
        beta, posterior = path.betas.to(t.device)[n], path.posterior_variance.to(t.device)
        small = torch.cat([posterior[1:2], posterior[1:]])[n]
        of_data = expand(levels[n].sqrt() * beta / (1 - levels[n + 1]), error)
        log_variance = learned_log_variance(f.double(), expand(beta, f), expand(small, f))
        spread = (of_data * error).square() + expand(posterior[n], error)
        constant = torch.where(n == 0, math.log(2 * math.pi), -small.log() - 1)
        term = (log_variance + spread / log_variance.exp()).flatten(1).mean(1) + constant
        return (path.num_steps / 2 * term).to(error.dtype)

    def draw(self, random: Random) -> tuple[Tensor, Tensor]:
        """Return times (B,) and the weights (B,) of their errors, in float64."""
        if not self.importance_sampling:
            t = self.path.on_grid(self.times.sample(random).double())
            return t, self.weight(t)
        count = self._steps or CELLS
        starts = torch.arange(count, dtype=torch.float64, device=random.index.device) / count
        middle = self.path.on_grid(starts + 0.5 / count)
        assert not isinstance(self.weighting, Flat)
        error = self.path.noise_error(middle, kind="v", data_std=self.data_std)
        shares = self.weighting(self.path, middle) * error.square()
        shares = shares / shares.sum()
        cell = torch.searchsorted(shares.cumsum(0), random.uniform("time").double()).clamp(max=count - 1)
        t = self.path.on_grid(starts[cell] + random.uniform("time within").double() / count)
        return t, self.weight(t) / (count * shares[cell])

    def weight(self, t: Tensor) -> Tensor:
        """Return the weights (B,) at times t (B,) on the squared error of what is predicted."""
        if isinstance(self.weighting, Flat):
            return torch.ones_like(t)
        error = self.path.noise_error(t, kind=self.prediction, data_std=self.data_std)
        return self.weighting(self.path, t) * error.square()

    @property
    def _steps(self) -> int:
        """The number of steps of a discrete path, else 0."""
        return self.path.num_steps if isinstance(self.path, Discrete) else 0
