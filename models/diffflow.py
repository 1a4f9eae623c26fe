"""A diffusion whose drift is learned: chains from data to noise and back, trained together.

At times 0 = t_0 < ... < t_N = 1 the chain q takes data to noise, p takes N(0, I) back. A network says the
drift f, and one the score s, or both are heads of one trunk; each is asked at the state it is at, so that q
uses them at the clean end of a step and p at the noisy one. With h = t_n - t_{n-1} a step of Euler's is

    q(x_n | x_{n-1}) = N( x_{n-1} + h f_{n-1}(x_{n-1}),  h g_{n-1}^2 I )
    p(x_{n-1} | x_n) = N( x_n - h (f_n(x_n) - g_n^2 s_n(x_n)),  h g_n^2 I )

With a `path`, a variance-preserving one at the angles a_n, f is a residual beside DDPM's own drift, which is
integrated exactly; the network predicts the data as a denoiser does:

    q(x_n | x_{n-1}) = N( (1 - beta_n)^(1/2) x_{n-1} + (a_n - a_{n-1}) f_{n-1}(x_{n-1}),  beta_n I )
    p(x_{n-1} | x_n) = N( mean of q(x_{n-1} | y, data) at y = x_n - (a_n - a_{n-1}) f_n(x_n),  beta_n I )

f is 0 at birth, and the pair is the chain of that DDPM (bound.py, "fixed_large").

The variance of p may be learned, as a factor on the one above. The flow is dx/dt = f - g^2 s / 2.

Source: Zhang and Chen, "Diffusion normalizing flow", 2021, eqs. 11 and 12.
"""

import copy
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from .bound import gaussian, posterior_mean
from .condition import Condition
from .flow_map import FlowMap
from .log_variance import LogVariance
from .path import Prediction, expand
from .schedule import Cosine, LinearBetas, ScaledLinearBetas
from .volatility import Volatility

Betas = Annotated[LinearBetas | ScaledLinearBetas | Cosine, Field(discriminator="name")]
MOST_WIDENING = 4.0  # of the logarithm of what g^2, or a variance of p, is multiplied by, by magnitude


class Said(NamedTuple):
    """What the networks say at a state (B, ...): drift, score or prediction, maybe log-variance of p."""

    drift: Tensor
    score: Tensor
    widening: Tensor | None


class DiffFlow(FlowMap):
    """The pair of chains: `drift` is the drift's own network, None where `backbone` has a head for it.

    Without a `path` there is a `volatility` g. `num_steps` and `exponent` make the usual grid of times.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        drift: nn.Module | None = None,
        path: Betas | None = None,
        prediction: Prediction = "noise",
        data_std: float = 1.0,
        volatility: Volatility | None = None,
        num_steps: int = 30,
        exponent: float = 0.9,
    ) -> None:
        super().__init__(backbone, path)
        assert (path is None) != (volatility is None)
        self.drift, self.residual, self.volatility = drift, path is not None, volatility
        self.prediction: Prediction = prediction
        self.data_std, self.num_steps, self.exponent = data_std, num_steps, exponent
        self.learned_volatility: LogVariance | None = None
        self.widening: LogVariance | None = None  # by step
        self.widened_by_network = False

    @classmethod
    def of(cls, network: Any, means: dict[str, Any]) -> Self:
        """Return the model of a backbone that was trained for `means`, the settings of the objective."""
        channels, shared = network.sample_shape[0], means["shared"]
        by_network = means["reverse_variance"] == "network"
        if network.out_channels != (1 + shared + by_network) * channels:
            said = " and ".join(["the score", *["the drift"] * shared, *["the variance"] * by_network])
            raise ValueError(
                f"model.out_channels: {network.out_channels}, but the network says {said} in {channels} "
                f"channels each; set it to {(1 + shared + by_network) * channels}"
            )
        parsed: dict[str, Any] = {
            "path": TypeAdapter[Any](Betas | None).validate_python(means["path"]),
            "volatility": TypeAdapter[Any](Volatility | None).validate_python(means["volatility"]),
        }
        parsed |= {key: means[key] for key in ("prediction", "data_std", "num_steps", "exponent")}
        drift = None if shared else copy.deepcopy(network)
        made = cls(network, drift=drift, **parsed)
        made.learned_volatility = LogVariance() if means["learned_volatility"] else None
        made.widening = LogVariance() if means["reverse_variance"] == "step" else None
        made.widened_by_network = by_network
        if made.residual:
            silence(network if drift is None else drift)
        if made.residual and by_network:
            silence(network)
        return made

    @classmethod
    def refusal(cls, means: dict[str, Any], old: dict[str, Any]) -> str | None:
        """Return why a model of `means` cannot start from a network that meant `old`, or None."""
        same = {key: value for key, value in means.items() if key not in ("num_steps", "exponent")}
        if old.get("kind") == "diffflow":
            keys = [key for key, value in same.items() if old[key] != value]
        elif "kind" in old or means["path"] is None:
            return "a network of another kind; one of ddpm can go on with objective.path set to its own"
        else:
            if means["shared"] or means["reverse_variance"] == "network":
                return "it has one head; set objective.shared to false, and reverse_variance to tied or step"
            keys = [key for key in ("path", "prediction", "data_std") if old.get(key) != means[key]]
        differences = ", ".join(f"objective.{key} is {old.get(key)!r} there" for key in keys)
        return f"{differences}; set it alike here" if keys else None

    @torch.no_grad()
    def start_from(self, denoiser: FlowMap) -> None:
        """Take a denoiser's weights for the prediction, and for the drift, whose last layer stays 0."""
        assert self.drift is not None
        for network in (self.backbone, self.drift):
            network.load_state_dict(denoiser.backbone.state_dict())
        silence(self.drift)

    def say(self, x: Tensor, t: Tensor, condition: Condition | None = None, *, dtype: torch.dtype) -> Said:
        """Return what the networks say at x (B, ...) and t (B,), asked in `dtype`."""
        x, t, channels = self._seen(x, t).to(dtype), t.to(dtype), x.shape[1]
        heads = self.backbone(x, t, t, condition).to(torch.float64).split(channels, dim=1)
        widening = MOST_WIDENING * torch.tanh(heads[-1] / MOST_WIDENING) if self.widened_by_network else None
        if self.drift is None:
            return Said(heads[1], heads[0], widening)
        return Said(self.drift(x, t, t, condition)[:, :channels].to(torch.float64), heads[0], widening)

    def say_drift(self, x: Tensor, t: Tensor, condition: Condition | None, *, dtype: torch.dtype) -> Tensor:
        """Return the drift (B, ...) alone."""
        if self.drift is None:
            return self.say(x, t, condition, dtype=dtype).drift
        seen, t = self._seen(x, t).to(dtype), t.to(dtype)
        return self.drift(seen, t, t, condition)[:, : x.shape[1]].to(torch.float64)

    def _seen(self, x: Tensor, t: Tensor) -> Tensor:
        if self.residual and self.prediction == "v":
            return x / expand(self.path.scale(t, data_std=self.data_std), x)
        return x

    def square_volatility(self, t: Tensor) -> Tensor:
        """Return g^2 (B,) at times t (B,), in float64."""
        assert self.volatility is not None
        square = self.volatility.square(t.double())
        if self.learned_volatility is None:
            return square
        return square * limited(self.learned_volatility(t, t)).double().exp()

    def forward_step(self, x: Tensor, drift: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (B, ...) and standard deviation (B,) of q(x_t | x_s = x), for s <= t."""
        if not self.residual:
            h = t - s
            return x + expand(h, x) * drift, (h * self.square_volatility(s)).sqrt()
        before, after = self.path.angle(s), self.path.angle(t)
        beta = 1 - after.cos().square() / before.cos().square()
        return expand((1 - beta).sqrt(), x) * x + expand(after - before, x) * drift, beta.sqrt()

    def reverse_step(self, x: Tensor, said: Said, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (B, ...) and standard deviation (B,) of p(x_s | x_t = x), the latter not widened."""
        if not self.residual:
            h, square = expand(t - s, x), self.square_volatility(t)
            return x - h * (said.drift - expand(square, x) * said.score), ((t - s) * square).sqrt()
        before, after = self.path.angle(s), self.path.angle(t)
        x = x - expand(after - before, x) * said.drift
        data = self._end_points(x, said, t)[0]
        alpha_bar = before.cos().square(), after.cos().square()
        return posterior_mean(data, x, *alpha_bar), (1 - alpha_bar[1] / alpha_bar[0]).sqrt()

    def _end_points(self, x: Tensor, said: Said, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.end_points(x, said.score, t, kind=self.prediction, data_std=self.data_std)

    def log_widening(self, said: Said, s: Tensor, t: Tensor) -> Tensor | None:
        """Return by how much (B, ...) p is wider than q, as a logarithm; None where it is tied to q."""
        if self.widening is not None:
            return expand(limited(self.widening(t, s)).double() / 2, said.score).expand_as(said.score)
        return None if said.widening is None else said.widening / 2

    def reverse_log_density(self, x: Tensor, later: Tensor, said: Said, s: Tensor, t: Tensor) -> Tensor:
        """Return log p(x_s = x | x_t = later) (B,), with what was said at `later`."""
        mean, std = self.reverse_step(later, said, s, t)
        widening = self.log_widening(said, s, t)
        if widening is None:
            return gaussian(x, mean, std)
        width = widening.exp()
        return gaussian(x / width, mean / width, std) - widening.flatten(1).sum(1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return f - g^2 s / 2, or DDPM's velocity and d angle / dt times the residual f."""
        said = self.say(x, t, condition, dtype=x.dtype)
        if not self.residual:
            return (said.drift - expand(self.square_volatility(t) / 2, x) * said.score).to(x.dtype)
        path = self.path
        speed = path.sigma_dot(t) * path.alpha(t) - path.alpha_dot(t) * path.sigma(t)
        said = Said(said.drift.to(x.dtype), said.score.to(x.dtype), None)
        return path.velocity(*self._end_points(x, said, t), t) + expand(speed, x) * said.drift

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the velocity at s: as a flow map it jumps by that alone."""
        return self.velocity(x, s, condition)

    def grid(self, num_steps: int | None = None) -> Tensor:
        """Return times (n / N)^(1 / exponent) (N + 1,) in float64, on the steps of a path."""
        grid = torch.linspace(0, 1, (num_steps or self.num_steps) + 1, dtype=torch.float64) ** (
            1 / self.exponent
        )
        if self.residual:
            grid[1:] = self.path.on_grid(grid[1:])
        return grid

    def state(
        self,
        data: Tensor,
        t: Tensor,
        *,
        draw: Callable[[str], Tensor],
        condition: Condition | None = None,
    ) -> Tensor:
        """Return x_t (B, ...) of data (B, ...) at times t (B,), by steps of the usual grid up to t."""
        x, t = data.double(), t.double()
        grid = self.grid().to(data.device)
        for n in range(1, len(grid)):
            start, end = torch.minimum(grid[n - 1], t), torch.minimum(grid[n], t)
            drift = self.say_drift(x, start, condition, dtype=data.dtype)
            mean, std = self.forward_step(x, drift, start, end)
            x = mean + expand(std, x) * draw(f"noise of step {n}").double()
        return x.to(data.dtype)


def limited(value: Tensor) -> Tensor:
    """Return a logarithm kept within MOST_WIDENING, by magnitude."""
    return MOST_WIDENING * torch.tanh(value / MOST_WIDENING)


@torch.no_grad()
def silence(network: Any) -> None:
    """Set a network's last layer to 0, and so its output."""
    if not hasattr(network, "last_layer"):
        raise ValueError(
            f"model.name: {type(network).__name__} does not say which layer is its last, which has to start "
            "at 0 with objective.path; give it a property last_layer, as the backbones mlp, dit and unet have"
        )
    for parameter in network.last_layer.parameters():
        parameter.zero_()
