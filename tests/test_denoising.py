"""Each denoising loss is the formula of its paper, has its minimum at the exact posterior, and gets there."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftmap.models.denoiser import Denoiser
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.models.schedule import Cosine, LinearBetas, ScaledLinearBetas
from driftmap.trainer.config import ConfigError, checked
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.ddpm import Ddpm
from driftmap.trainer.seeds import Random
from driftmap.trainer.times import LogitNormal, Uniform
from driftmap.trainer.weighting import P2, Bound, Edm, Flat, MinSnr, Sigmoid, Simple
from oracle import Posterior, gaussian_batch

PATHS: dict[str, Any] = {
    "linear betas": LinearBetas(),
    "cosine": Cosine(),
    "zero terminal": ScaledLinearBetas(zero_terminal_snr=True),
    "line": Linear(),
    "quarter circle": Trig(),
}
WEIGHTINGS: dict[str, Any] = {
    "prediction": Flat(),
    "simple": Simple("simple"),
    "bound": Bound("bound"),
    "min snr": MinSnr("min_snr"),
    "p2": P2("p2", gamma=0.5),
    "sigmoid": Sigmoid("sigmoid"),
    "edm": Edm("edm"),
}
KINDS = ["noise", "data", "v", "velocity"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_path = pytest.mark.parametrize("name", PATHS)
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)


def legal(name: str, kind: str) -> bool:
    return kind != "noise" or name in ("linear betas", "cosine")


def objective(name: str, kind: Any, weighting: str = "prediction", **settings: Any) -> Ddpm:
    return Ddpm(path=PATHS[name], prediction=kind, weighting=WEIGHTINGS[weighting], **settings)


# What each weighting says in its paper: a weight of the error of data or noise, by the signal-to-noise ratio.
FORMULAS: dict[str, Any] = {
    "simple": lambda data, noise, snr: noise,
    "min snr": lambda data, noise, snr: torch.minimum(snr, torch.tensor(5.0)) * data,
    "p2": lambda data, noise, snr: noise / (1 + snr) ** 0.5,
    "edm": lambda data, noise, snr: (1 / snr + 0.25) / (0.5 / snr.sqrt()) ** 2 * data,
}


@pytest.mark.parametrize("weighting", FORMULAS)
@every_kind
@every_path
def test_a_weighting_is_its_formula_whatever_is_predicted(name: str, kind: Any, weighting: str) -> None:
    if not legal(name, kind):
        return
    path, batch = PATHS[name], gaussian_batch(300)
    loss = objective(name, kind, weighting)
    model = Denoiser(Wrong(Posterior(path, kind)), path, prediction=kind)
    found = loss(model, batch)
    t = found["time"]
    x, noise = path.state(batch.data, batch.noise(), t), batch.noise()
    data_said, noise_said = path.end_points(x, model.predict(x, t, t), t, kind=kind)
    of_data = (data_said - batch.data).square().mean(1)
    of_noise = (noise_said - noise).square().mean(1)
    expected = FORMULAS[weighting](of_data, of_noise, path.alpha(t) ** 2 / path.sigma(t) ** 2)
    # Next to pure noise the noise's error is lost in rounding where the ratio is 1e-33.
    known = path.alpha(t).abs() > 1e-10
    weights = loss.weight(t) * found["error"]
    torch.testing.assert_close(weights[known], expected[known], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["loss"], weights.mean(), rtol=1e-9, atol=1e-9)


class Wrong(nn.Module):
    """A network's prediction and something besides."""

    null_label = None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return a tensor like x."""
        return self.inner(x, s, t, condition) + 0.3 * (3 * x).sin() + 0.1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_of_a_chain_is_the_divergence_of_its_steps(variance: Any) -> None:
    """KL of two Gaussians with DDPM's means (eqs. 7 and 11), step by step, summed over the chain."""
    path = LinearBetas(num_steps=50)
    batch = Batch(torch.full((50, 5), 0.3).double(), None, Random(0, torch.arange(50)))
    loss = Ddpm(path=path, weighting=Bound("bound", variance))
    t = torch.arange(1, 51).double() / 50
    noise, said = batch.noise(), 0.8 * batch.noise() + 0.2
    weights = loss.weight(t) * (noise - said).square().mean(1) / 50
    alpha, levels, before = (
        1 - path.betas,
        path.alpha_bar,
        torch.cat([torch.ones(1).double(), path.alpha_bar[:-1]]),
    )
    x = levels.sqrt()[:, None] * batch.data + (1 - levels).sqrt()[:, None] * noise
    means = [
        (x - (path.betas / (1 - levels).sqrt())[:, None] * e) / alpha.sqrt()[:, None] for e in (noise, said)
    ]
    posterior = path.betas * (1 - before) / (1 - levels)
    model_variance = posterior if variance == "fixed_small" else path.betas
    expected = (means[0] - means[1]).square().mean(1) / (2 * model_variance)
    torch.testing.assert_close(weights[1:], expected[1:])
    first = (means[0] - means[1])[0].square().mean() / (2 * posterior[1])
    torch.testing.assert_close(weights[0], first)


def test_the_bound_of_a_path_is_the_limit_of_the_bounds_of_chains() -> None:
    """-1/2 d log snr / dt: 4000 steps of the cosine schedule, whose path is the same, agree to a percent."""
    t = torch.linspace(0.1, 0.9, 9).double()
    fine = Bound("bound")(Cosine(num_steps=4000), t)
    f = [
        ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        for u in (t, t - 1e-6)
    ]
    slope = ((f[0] / (1 - f[0])).log() - (f[1] / (1 - f[1])).log()) / 1e-6
    torch.testing.assert_close(fine, -slope / 2, rtol=1e-2, atol=0)
    torch.testing.assert_close(Bound("bound")(Linear(), t), 1 / (t * (1 - t)))
    torch.testing.assert_close(
        Sigmoid("sigmoid")(Linear(), t), torch.sigmoid(2 - 2 * ((1 - t) / t).log()) / (t * (1 - t))
    )


def test_the_loss_of_v_is_that_of_edm() -> None:
    """E lambda(sigma) |D(data + sigma noise) - data|^2 with log-normal sigma: eq. 2 and table 1."""
    batch, spread = gaussian_batch(400), 0.4
    times = LogitNormal("logit_normal", -1.2, 1.2)
    loss = Ddpm(path=Linear(), prediction="v", data_std=spread, times=times)
    model = Denoiser(
        Wrong(Posterior(Linear(), "v", data_std=spread)), Linear(), prediction="v", data_std=spread
    )
    sigma = (-1.2 + 1.2 * batch.random.normal("time").double()).exp()
    t = (sigma / (1 + sigma))[:, None]
    y = batch.data + sigma[:, None] * batch.noise()
    r = (sigma**2 + spread**2).sqrt()[:, None]
    F = -model.backbone(y / r, t[:, 0], t[:, 0])
    denoised = spread**2 / r**2 * y + sigma[:, None] * spread / r * F
    weight = (sigma**2 + spread**2) / (sigma * spread) ** 2
    expected = (weight * (denoised - batch.data).square().mean(1)).mean()
    torch.testing.assert_close(loss(model, batch)["loss"], expected, rtol=1e-5, atol=0)
    weighted = Ddpm(path=Linear(), prediction="data", weighting=Edm("edm", spread), times=times)
    errors = weighted.weight(t[:, 0]) * (denoised - batch.data).square().mean(1)
    torch.testing.assert_close(errors.mean(), expected)


class Affine(nn.Module):
    """A prediction plus a function of the state with two free numbers: at 0 the exact posterior.

    What is added is of the same size for v at all times, which no weighting lets grow without bound.
    """

    null_label = None

    def __init__(self, path: Any, kind: Any, shift: float) -> None:
        super().__init__()
        self.inner, self.path, self.kind = Posterior(path, kind), path, kind
        self.extra = nn.Parameter(torch.tensor([0, shift], dtype=torch.float64))

    def size(self, t: Tensor) -> Tensor:
        """Return what a change of v by 1 is for the prediction."""
        return self.path.noise_error(t, kind="v") / self.path.noise_error(t, kind=self.kind)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return a tensor like x."""
        added = self.extra[0] * (2 * x + s[:, None]).sin() + self.extra[1]
        return self.inner(x, s, t, condition) + self.size(s)[:, None] * added


@every_weighting
@every_kind
@every_path
def test_at_the_exact_posterior_the_gradient_is_zero_in_expectation(
    name: str, kind: Any, weighting: str
) -> None:
    """By a z-test over samples, which sees it where the prediction is off by 0.3."""
    if not legal(name, kind):
        return
    path, batch = PATHS[name], gaussian_batch(4000)
    loss = objective(name, kind, weighting, importance_sampling=weighting != "prediction")
    for shift in (0.0, 0.3):
        network = Affine(path, kind, shift)
        model = Denoiser(network, path, prediction=kind)
        t, weight = loss.draw(batch.random)
        target = path.target(batch.data, batch.noise(), t, kind=kind)
        residual = (model.predict(path.state(batch.data, batch.noise(), t), t, t) - target).mean(1)
        gradients = 2 * weight * network.size(t) * residual  # of each sample, in the second number
        (slope,) = torch.autograd.grad(loss(model, batch)["loss"], network.extra)
        torch.testing.assert_close(slope[1], gradients.mean(), rtol=1e-6, atol=1e-9)
        z = gradients.mean() / gradients.std() * math.sqrt(len(gradients))
        assert (abs(z.item()) < 4) == (shift == 0), z


@pytest.mark.parametrize("name, kind", [("linear betas", "noise"), ("cosine", "v"), ("line", "v")])
@pytest.mark.parametrize("weighting", ["bound", "sigmoid", "min snr"])
def test_importance_sampling_has_the_same_mean_and_less_spread(name: str, kind: Any, weighting: str) -> None:
    path, batch = PATHS[name], gaussian_batch(20_000)
    model = Denoiser(Posterior(path, kind, mean=0.9), path, prediction=kind)
    values = []
    for sampled in (False, True):
        loss = objective(name, kind, weighting, importance_sampling=sampled)
        t, weight = loss.draw(batch.random)
        if isinstance(path, LinearBetas | Cosine):
            torch.testing.assert_close(t * 1000, (t * 1000).round())
        found = loss(model, batch)
        values.append(weight * found["error"])
        torch.testing.assert_close(found["time"], t)
        torch.testing.assert_close(found["loss"], values[-1].mean())
    plain, sampled = values
    error = math.sqrt((plain.var() + sampled.var()) / len(plain))
    assert abs(plain.mean() - sampled.mean()) < 4 * error
    assert sampled.std() < (0.1 if weighting == "bound" else 0.7) * plain.std()


@pytest.mark.parametrize("name", ["linear betas", "line"])
def test_times_are_steps_of_a_chain_or_anywhere_on_a_path(name: str) -> None:
    found = objective(name, "v")(
        Denoiser(Posterior(PATHS[name], "v"), PATHS[name], prediction="v"), gaussian_batch(500)
    )
    steps = found["time"] * 1000
    assert torch.allclose(steps, steps.round(), atol=1e-9) == (name == "linear betas")
    assert found["time"].min() > 0 and found["time"].max() <= 1 and found["time"].std() > 0.2


def test_labels_are_dropped_in_their_share() -> None:
    class Recording(Posterior):
        null_label = 2

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            self.condition = condition
            return super().forward(x, s, t)

    network, batch = Recording(LinearBetas(), "noise"), gaussian_batch(2000, labels=True)
    Ddpm(condition_dropout=0.3)(Denoiser(network, LinearBetas(), prediction="noise"), batch)
    dropped = network.condition == 2
    assert torch.equal(network.condition[~dropped], batch.condition[~dropped])
    assert abs(dropped.double().mean() - 0.3) < 4 * math.sqrt(0.21 / 2000)


class Linearly(nn.Module):
    """A prediction a(t) x + b(t), with a and b straight between 41 times: all that Gaussian data need."""

    null_label, sample_shape = None, (2,)

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.level = (nn.Parameter(torch.zeros(41)) for _ in range(2))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return the prediction (B, 2)."""
        part = (s * 40).long().clamp(max=39)
        a, b = (
            torch.lerp(line[part], line[part + 1], s * 40 - part)[:, None]
            for line in (self.slope, self.level)
        )
        return a * x + b


TRAINED = {
    "ddpm": ("linear betas", "noise", "simple", False),
    "the bound": ("linear betas", "v", "bound", True),
    "cosine v": ("cosine", "v", "prediction", False),
    "data, min snr": ("cosine", "data", "min snr", False),
    "p2": ("linear betas", "v", "p2", False),
    "edm": ("line", "v", "edm", False),
    "sigmoid": ("quarter circle", "velocity", "sigmoid", True),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_comes_down_to_the_exact_posterior(name: str) -> None:
    """On N(0.7, 0.4^2) in two dimensions; what is left is that lines between 41 times are no curves."""
    along, kind, weighting, sampled = TRAINED[name]
    loss, path = objective(along, kind, weighting, importance_sampling=sampled), PATHS[along]
    model = Denoiser(Linearly(), path, prediction=kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 150)

    def batch(number: int, size: int) -> Batch:
        random = Random(1, torch.arange(number * size, (number + 1) * size))
        return Batch(0.7 + 0.4 * random.normal("data", (2,)), None, random)

    for step in range(150):
        optimizer.zero_grad()
        loss(model, batch(step, 512))["loss"].backward()
        optimizer.step()
        schedule.step()
    # On the noise level that the weighting looks at.
    with torch.no_grad():
        test = batch(10_000, 20_000)
        found = loss(model, test)
        best = loss(Denoiser(Posterior(path, kind), path, prediction=kind), test)
        start = loss(Denoiser(Linearly(), path, prediction=kind), test)
    excess = (found["loss"] - best["loss"]).item()
    assert -0.005 * best["loss"] < excess < 0.05 * (start["loss"] - best["loss"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"path": {"name": "linear"}},
            "this path ends in pure noise, where a prediction of the noise says nothing",
        ),
        ({"path": {"name": "cosine", "zero_terminal_snr": True}}, "set prediction to v or data"),
        ({"data_std": 0.5}, "data_std has no effect on prediction noise; remove it, or predict v"),
        (
            {"weighting": {"name": "bound"}, "times": {"name": "logit_normal"}},
            "weighting bound is an integral over uniform times",
        ),
        (
            {"weighting": {"name": "sigmoid"}, "times": {"name": "uniform", "shift": 2}},
            "importance_sampling to true",
        ),
        (
            {"importance_sampling": True},
            "importance_sampling draws times by the weighting: it needs one besides",
        ),
        (
            {"weighting": {"name": "p2"}, "times": {"name": "logit_normal"}, "importance_sampling": True},
            "importance_sampling draws times by the weighting: it needs one besides prediction, and no times",
        ),
        (
            {
                "path": {"name": "trig"},
                "prediction": "v",
                "weighting": {"name": "bound", "variance": "fixed_large"},
            },
            "weighting.variance has no effect on a path that is not discrete; remove it",
        ),
        ({"weighting": {"name": "min_snr", "gama": 3}}, "no such key; did you mean 'gamma'?"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        checked(Ddpm, settings, place="objective")
    assert message in str(refused.value) and str(refused.value).startswith("objective")


def test_a_shift_moves_times_towards_noise() -> None:
    random = gaussian_batch(5000).random
    for times in (Uniform(shift=3.0), LogitNormal("logit_normal", 0.5, 0.8, shift=3.0)):
        plain = type(times)(**{**vars(times), "shift": 1.0}).sample(random).double()
        shifted = times.sample(random).double()
        torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3), rtol=0, atol=0.01)


def test_the_loss_of_a_velocity_is_flow_matching() -> None:
    from driftmap.trainer.objectives.flow_matching import FlowMatching

    batch, model = gaussian_batch(), FlowMap(Wrong(Posterior(Linear(), "velocity")))
    ours = Ddpm(path=Linear(), prediction="velocity")(model, batch)["loss"]
    torch.testing.assert_close(ours, FlowMatching()(model, batch)["loss"])
