"""A learned variance is trained by the bound alone, and with the right one a chain needs few steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from driftmap.data.synthetic import write_points
from driftmap.models.denoiser import Denoiser, Guided
from driftmap.models.samplers import ddpm, sampler_of, time_grid
from driftmap.models.schedule import Cosine, LinearBetas
from driftmap.trainer.build import check_inputs, load_model, train
from driftmap.trainer.config import ConfigError, checked, read_config
from driftmap.trainer.objectives.ddpm import Ddpm
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from oracle import Posterior, gaussian_batch
from runs import write_config

CHAIN = Cosine(num_steps=20)
LEARNED = Ddpm(path=CHAIN, prediction="v", variance="learned")


def steps(path: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return beta_n, the posterior's variance (at 1 that of 2), and the weight of the data in its mean."""
    before = torch.cat([torch.ones(1).double(), path.alpha_bar[:-1]])
    beta, posterior = path.betas, path.betas * (1 - before) / (1 - path.alpha_bar)
    small = torch.cat([posterior[1:2], posterior[1:]])
    return beta, small, before.sqrt() * beta / (1 - path.alpha_bar)


class WithVariance(nn.Module):
    """The exact posterior of N(0.7, 0.4^2), and the f of the exact variance of a step plus `shift`."""

    null_label = None

    def __init__(self, path: Any = CHAIN, shift: float = 0.0, fixed: float | None = None) -> None:
        super().__init__()
        self.path, self.inner, self.fixed = path, Posterior(path, "v"), fixed
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return v and f (B, 10)."""
        said = self.inner(x, s, t)
        n = (s * self.path.num_steps).round().long() - 1
        beta, small, of_data = (part[n] for part in steps(self.path))
        level = self.path.alpha_bar[n]
        of_step = small.where(n > 0, torch.zeros_like(small))
        exact = of_step + of_data**2 * 0.4**2 * (1 - level) / (level * 0.4**2 + 1 - level)
        f = 2 * (exact / small).log() / (beta / small).log() - 1
        f = (f if self.fixed is None else torch.full_like(f, self.fixed)) + self.shift
        return torch.cat([said, f[:, None].expand_as(said)], dim=1)


def denoiser(**settings: Any) -> Denoiser:
    return Denoiser(WithVariance(**settings), settings.get("path", CHAIN), prediction="v")


def test_the_term_of_the_bound_is_the_divergence_of_the_steps() -> None:
    """And for the last step minus the log-density of the data."""
    path = LinearBetas(num_steps=50)
    n, random = torch.arange(50), Random(0, torch.arange(50))
    error, f = (random.normal(name, (5,)).double() for name in ("error", "f"))
    found = Ddpm(path=path, variance="learned").bound(error, f, (n + 1) / 50)
    beta, small, of_data = (part[:, None] for part in steps(path))
    std = (((1 + f) * beta.log() + (1 - f) * small.log()) / 4).exp()
    mean = of_data * error
    expected = 50 * kl_divergence(Normal(mean, small.sqrt()), Normal(0.0, std)).mean(1)
    torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close(found[0], -50 * Normal(0.0, std[0]).log_prob(error[0]).mean())


def test_nothing_of_the_bound_flows_into_the_prediction() -> None:
    batch, fixed = gaussian_batch(), Ddpm(path=CHAIN, prediction="v")

    class Free(nn.Module):
        """Two numbers: what is added to v, and f."""

        null_label = None

        def __init__(self) -> None:
            super().__init__()
            self.numbers = nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64))

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            """Return v and f (B, 10)."""
            return torch.cat([x + self.numbers[0], 0 * x + self.numbers[1]], dim=1)

    slopes = []
    for loss in (fixed, LEARNED):
        network = Free()
        found = loss(Denoiser(network, CHAIN, prediction="v"), batch)
        found["loss"].backward()
        slopes.append(network.numbers.grad)
    torch.testing.assert_close(slopes[0][0], slopes[1][0])
    assert slopes[0][1] == 0 and slopes[1][1] != 0


def test_the_bound_is_least_at_the_exact_variance() -> None:
    def slope(shift: float) -> tuple[float, float]:
        model = denoiser(shift=shift)
        losses = LEARNED(model, gaussian_batch(4000))
        (slope,) = torch.autograd.grad(losses["bound"].mean(), model.backbone.shift)
        return slope.item(), losses["bound"].mean().item()

    (at, least), (above, more), (below, other) = slope(0.0), slope(0.3), slope(-0.3)
    assert abs(at) < 0.1 * above and below < -0.5 * above
    assert least < more and least < other


def draws(random: Random) -> Any:
    return lambda number: random.normal(f"step {number}", (5,)).double()


def test_with_the_exact_variance_a_chain_of_few_steps_has_the_spread_of_the_data() -> None:
    random = Random(4, torch.arange(4000))
    noise = random.normal("noise", (5,)).double()
    settings: Any = {"grid": time_grid(20), "path": CHAIN, "draw": draws(random)}
    learned, small, large = (
        ddpm(denoiser(), noise, variance=variance, **settings).std().item()
        for variance in ("learned", "fixed_small", "fixed_large")
    )
    assert learned == pytest.approx(0.4, abs=0.01)
    assert abs(small - 0.4) > 0.03 and abs(large - 0.4) > 0.01


@pytest.mark.parametrize("f, variance", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_at_both_ends_it_is_a_fixed_variance_and_costs_nothing(f: float, variance: Any) -> None:
    random, model, calls = Random(5, torch.arange(8)), denoiser(fixed=f), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.backbone.register_forward_hook(count)
    noise = random.normal("noise", (5,)).double()
    settings: Any = {"grid": time_grid(20), "path": CHAIN, "draw": draws(random), "clip": 1.0}
    found = ddpm(model, noise, variance="learned", **settings)
    assert calls == 20
    torch.testing.assert_close(found, ddpm(model, noise, variance=variance, **settings))


@pytest.mark.parametrize(
    "model", [Denoiser(Posterior(CHAIN, "v"), CHAIN, prediction="v"), Guided(denoiser(), 2, null_condition=1)]
)
def test_what_says_no_variance_cannot_be_asked_for_one(model: Any) -> None:
    noise = Random(5, torch.arange(8)).normal("noise", (5,)).double()
    sampler = sampler_of("ddpm:variance=learned", path=CHAIN, draw=draws(Random(5, torch.arange(8))))
    with pytest.raises(
        ValueError, match="has learned no variance, or is guided; set variance to fixed_small"
    ):
        sampler.sample(model, noise, grid=time_grid(4))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": {"name": "trig"}, "prediction": "v"}, "it needs a discrete path, such as linear_betas"),
        ({"weighting": {"name": "bound"}, "importance_sampling": True}, "and no importance_sampling"),
        ({"variance": "fixed", "bound_share": 0.1}, "bound_share has no effect on a fixed variance"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        checked(Ddpm, {"variance": "learned", **settings}, place="objective")
    assert message in str(refused.value)


def test_a_run_learns_it_with_twice_the_channels(tmp_path: Path) -> None:
    write_points(tmp_path / "moons", "moons", n=200, seed=0)
    model = {"name": "mlp", "channels": 2, "width": 16, "depth": 1, "out_channels": 4}
    config = write_config(
        tmp_path / "config.yaml",
        tmp_path / "moons",
        model=model,
        objective={"name": "ddpm", "variance": "learned"},
    )
    train(recipe_from(read_config(config)), tmp_path / "run")
    found = load_model(tmp_path / "run")
    assert isinstance(found, Denoiser) and found.velocity(torch.zeros(3, 2), torch.ones(3)).shape == (3, 2)
    assert '"bound"' in (tmp_path / "run" / "log.jsonl").read_text()
    for change, message in (
        (
            "model.out_channels=2",
            "model.out_channels: 2, but samples of 2 channels and objective.variance learned",
        ),
        ("objective.variance=fixed", "variance fixed take 2; set it to 2"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_inputs(recipe_from(read_config(config, [change])))
        assert message in str(refused.value)
