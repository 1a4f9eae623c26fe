"""How likely a model finds data: bounds and the density of its flow, each exact over a whole data set.

    bound_bits_per_dim      the variational bound of the discrete chain, term by term (models/bound.py)
    iw_bound_bits_per_dim   the importance-weighted bound of the same chain, from K paths a sample
    ode_bits_per_dim        the density of the probability-flow ODE (models/ode_likelihood.py)
    exact_bits_per_dim      the density of a discrete flow (models/backbones/coupling_flow.py)

The first two bound one model, the third is another model: a number never leaves its key. Noise, steps and
probes are keyed by a sample's place in the data set.

Pixels u = 0 .. 255 are the data u / 127.5 - 1. The chain's decoder gives probabilities of u themselves. The
flow gives a density, which is asked at u + v - 1/2 on that scale, v uniform on [0, 1) ("uniform
dequantisation"): minus its logarithm in bits, plus log2(127.5) a dimension, is on average at least minus the
logarithm of the probability that the flow gives to u's bin (Theis, van den Oord and Bethge, 2016, eq. 3).
Latents and points are continuous; theirs are densities of what the network sees.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..models.backbones.coupling_flow import CouplingFlow
from ..models.bound import Chain, Decoder, Variance, importance_weighted, log_weight
from ..models.condition import Condition
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap, Velocity
from ..models.ode_likelihood import Interval, Solver, log_density
from ..models.path import expand
from ..models.schedule import Discrete
from .measuring import Estimate
from .objective import Batch
from .seeds import Random

PIXEL_SCALE = 127.5  # data = u / 127.5 - 1
UNIFORM = "uniform: data (u + v - 1/2) / 127.5 - 1, one v of [0, 1) a dimension; + log2(127.5) bits"
EXACT_DIMENSIONS = 16  # up to which the divergence is usually an exact trace
Probe = Literal["exact", "rademacher", "gaussian"]


@dataclass(frozen=True, eq=False)
class Denoising:
    """A model as a chain of `num_steps` even steps of its time, for one batch's conditions at a time.

    On a discrete path of more steps they are some of its own.
    """

    model: FlowMap
    num_steps: int
    variance: Variance = "fixed_large"
    pixels: bool = False  # data are u / 127.5 - 1: a discretised decoder, and predictions clipped to [-1, 1]

    @property
    def decoder(self) -> Decoder:
        """What p(data | x_1) is."""
        return "discretised" if self.pixels else "gaussian"

    def chain(self, batch: Batch) -> Chain:
        """Return the chain given a batch's conditions: whatever the path, its states at unit scale."""
        path, data = self.model.path, batch.data
        own = path.num_steps if isinstance(path, Discrete) else self.num_steps
        steps = -(torch.arange(1, self.num_steps + 1, device=data.device) * -own // self.num_steps)
        times = steps.double() / own

        def predict(x: Tensor, n: Tensor) -> Tensor:
            t = times[n - 1].to(data.dtype)
            guess = data_mean(self.model, x.to(data.dtype) * expand(path.scale(t), x), t, batch.condition)
            return guess.clamp(-1, 1) if self.pixels else guess

        alpha_bar = path.angle(times).cos().square()
        return Chain(predict, alpha_bar, variance=self.variance, decoder=self.decoder)

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know of the chain."""
        pixels = "none: the decoder gives probabilities of the 256 values"
        return {
            "N": self.num_steps,
            "variance": self.variance,
            "decoder": self.decoder,
            "dequantisation": pixels if self.pixels else "none: the data are continuous",
        }


@dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound: all N terms of each sample, or L_N, L_0 and `drawn_steps` of those between.

    The steps are drawn one in each of `drawn_steps` parts of 2 .. N, which are as long as they are far from
    the data, where the terms are large; each counts for its part, so the mean is the bound.
    """

    denoising: Denoising
    drawn_steps: int | None = None
    key: ClassVar[str] = "bound_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know."""
        drawn = f"L_N, L_0 and {self.drawn_steps} drawn steps a sample"
        terms = "all N" if self.drawn_steps is None else drawn
        return {**self.denoising.settings(), "K": 1, "terms_computed": terms}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Estimate:
        """Return the bound of each sample, the sums of its parts, and by step n those of L_n and errors."""
        chain = self.denoising.chain(batch)
        shape = tuple(batch.data.shape[1:])
        prior = chain.prior_term(batch.data)
        decoding, error = chain.data_term(batch.data, batch.random.normal("bound noise 1", shape))
        between = torch.zeros_like(prior)
        curve = [torch.stack([decoding.sum(), error.sum()])]
        for place, (n, weight) in enumerate(self._steps(batch.random, chain.num_steps), start=2):
            noise = batch.random.normal(f"bound noise {place}", shape)
            term, error = chain.step_term(batch.data, n, noise)
            between += weight * term
            curve.append(torch.stack([term.sum(), error.sum()]))
        sums = {"L_N": prior.sum(), "L_between": between.sum(), "L_0": decoding.sum()}
        if self.drawn_steps is None:
            sums["curve"] = torch.stack(curve)
        return Estimate(prior + between + decoding, len(curve), sums)

    def _steps(self, random: Random, num_steps: int) -> list[tuple[Tensor, float]]:
        """Return the steps n >= 2 to compute, each (B,), and what each one's term counts for."""
        if self.drawn_steps is None:
            return [(torch.full_like(random.index, n), 1.0) for n in range(2, num_steps + 1)]
        # Step n is the interval [n - 1, n); the parts of [1, N) are cut at the powers of one number.
        cuts = [num_steps ** (part / self.drawn_steps) for part in range(self.drawn_steps + 1)]
        steps = []
        for part, (first, last) in enumerate(pairwise(cuts)):
            place = first + (last - first) * random.uniform(f"step {part}").double()
            steps.append(((place.floor().long() + 1).clamp(max=num_steps), last - first))
        return steps


@dataclass(frozen=True, eq=False)
class ImportanceWeightedBound:
    """The importance-weighted bound from `trajectories` whole paths a sample."""

    denoising: Denoising
    trajectories: int
    key: ClassVar[str] = "iw_bound_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know."""
        return {**self.denoising.settings(), "K": self.trajectories}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Estimate:
        """Return the bound of each sample."""
        chain, shape = self.denoising.chain(batch), tuple(batch.data.shape[1:])

        def noise(trajectory: int, n: int) -> Tensor:
            return batch.random.normal(f"noise {n} of trajectory {trajectory}", shape)

        paths = [log_weight(chain, batch.data, partial(noise, k)) for k in range(self.trajectories)]
        evaluations = self.trajectories * chain.num_steps
        return Estimate(importance_weighted(torch.stack(paths)), evaluations, {})


@dataclass(frozen=True, eq=False)
class FlowLikelihood:
    """Minus the log-density of the probability-flow ODE, for pixels of their uniform dequantisation."""

    velocity: Velocity
    solver: Solver
    probe: Probe
    interval: Interval = (0.0, 1.0)
    pixels: bool = False
    key: ClassVar[str] = "ode_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know."""
        probes = "exact trace" if self.probe == "exact" else f"one {self.probe} probe a solve"
        return {
            "K": 1,
            "N": None,
            "solver": dict(vars(self.solver)),
            "divergence": probes,
            "interval": list(self.interval),
            "dequantisation": UNIFORM if self.pixels else "none: the data are continuous",
        }

    def __call__(self, batch: Batch) -> Estimate:
        """Return the negative log-likelihood of each sample."""
        data = batch.data
        if self.pixels:
            data = dequantised(batch)
        found, evaluations = log_density(
            self.velocity,
            data,
            condition=batch.condition,
            probe=probe_of(self.probe, batch),
            solver=self.solver,
            interval=self.interval,
        )
        nats = -found
        if self.pixels:
            nats = nats + math.log(PIXEL_SCALE) * data[0].numel()
            if nats.mean() < 0:
                raise FloatingPointError(
                    f"{self.key}: the flow gives pixels a probability of exp({-nats.mean():.4g}), more than "
                    "1: the solver is too coarse; give more steps, or dopri5 with a small tolerance"
                )
        return Estimate(nats, evaluations, {})


@dataclass(frozen=True, eq=False)
class ExactDensity:
    """Minus the log-density of a discrete flow."""

    model: CouplingFlow
    key: ClassVar[str] = "exact_bits_per_dim"

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know."""
        return {"K": 1, "N": None, "dequantisation": "none: the data are continuous"}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Estimate:
        """Return the negative log-likelihood of each sample."""
        assert batch.condition is None or isinstance(batch.condition, Tensor)
        return Estimate(-self.model.log_density(batch.data, batch.condition), 1, {})


def usual_probe(shape: tuple[int, ...]) -> Probe:
    """Return what the divergence is found by where nobody says: an exact trace of a few dimensions."""
    return "exact" if math.prod(shape) <= EXACT_DIMENSIONS else "rademacher"


def probe_of(kind: Probe, batch: Batch) -> Tensor | None:
    """Return the probes (B, ...) of a batch's solve, None for an exact trace."""
    shape = tuple(batch.data.shape[1:])
    if kind == "exact":
        return None
    if kind == "gaussian":
        return batch.random.normal("probe", shape)
    return torch.where(batch.random.uniform("probe", shape) < 0.5, -1.0, 1.0)


def dequantised(batch: Batch) -> Tensor:
    """Return pixels (B, ...) with uniform noise that fills the gaps between their 256 values."""
    shift = batch.random.uniform("dequantisation", tuple(batch.data.shape[1:])).to(batch.data.dtype) - 0.5
    return batch.data + shift / PIXEL_SCALE


def data_mean(model: FlowMap, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """Return E[data | x_t = x] (B, ...) as a model has it."""
    said, kind, data_std = model.predict(x, t, t, condition), "velocity", 1.0
    if isinstance(model, Denoiser):
        kind, data_std = model.prediction, model.data_std
    return model.path.end_points(x, said, t, kind=kind, data_std=data_std)[0]
