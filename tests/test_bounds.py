"""Bounds on the likelihood are bounds, and have the values that theory gives them."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from brute_force import reference_term
from driftmap.models.backbones.mlp import MLP
from driftmap.models.bound import Chain, discretised_gaussian, importance_weighted, log_weight
from driftmap.models.path import expand

STD = torch.tensor([1.2, 0.3], dtype=torch.float64)  # of Gaussian data of mean zero
ENTROPY = math.log(2 * math.pi * math.e) + STD.log().sum().item()


def gaussian_data(count):
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(10_000)) * STD


def noise_like(data, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.randn(data.shape, dtype=torch.float64, generator=generator)


def log_likelihood(data):
    return Normal(torch.zeros_like(STD), STD).log_prob(data).sum(1)


def vp_beta(t):
    return 0.1 + 19.9 * t


def vp_alpha_bar(t):
    return torch.exp(-(0.1 * t + 19.9 * t**2 / 2))


class EulerChains:
    """DiffFlow's chains: Euler steps of the variance-preserving process and of its exact reverse.

    Drift and score are taken where each step starts, and times grow a little from step to step.
    """

    def __init__(self, num_steps, *, start=1e-3, power=0.9):
        even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        self.times = (start**power + even * (1 - start**power)) ** (1 / power)
        self.num_steps = num_steps

    def forward(self, x, n):
        """Return mean and spread of a step to noise."""
        t, h = self.times[n - 1], self.times[n] - self.times[n - 1]
        return x * expand(1 - vp_beta(t) * h / 2, x), (vp_beta(t) * h).sqrt()

    def reverse_log_density(self, x, later, n):
        """Return log-densities of a step back."""
        t, h = self.times[n][:, None], (self.times[n] - self.times[n - 1])[:, None]
        beta, spread = vp_beta(t), vp_alpha_bar(t) * STD**2 + 1 - vp_alpha_bar(t)
        mean = later + (beta * later / 2 - beta * later / spread) * h
        return Normal(mean, (beta * h).sqrt()).log_prob(x).sum(1)


def gap(log_weights, data):
    """Return how far a bound is above the entropy, without the noise of which data were drawn."""
    return (log_likelihood(data) - log_weights).mean().item()


@pytest.mark.parametrize(("num_steps", "published"), [(10, 5.27), (30, 3.40), (100, 2.40), (1000, 1.87)])
def test_the_bound_of_a_simulated_path_is_the_known_one(num_steps, published):
    """Measured before with other code and other samples, to a few hundredths.

    With a noise that grows from step to step every normaliser counts: without them the bound at N = 1000
    would lie five nats lower, far below the entropy.
    """
    data = gaussian_data(1000)
    found = ENTROPY + gap(log_weight(EulerChains(num_steps), data, noise_like(data)), data)
    assert found == pytest.approx(published, abs=0.06)
    assert found > ENTROPY
    if num_steps == 1000:
        assert found < ENTROPY + 0.08


def of_paths(chain, data, num_paths):
    """Return the mean importance-weighted bound of K of 64 paths, for each K of `num_paths`."""
    weights = torch.stack([log_weight(chain, data, noise_like(data, k)) for k in range(64)])
    found = {}
    for k in num_paths:
        groups = [importance_weighted(group) for group in weights.split(k)]
        found[k] = ENTROPY + gap(-torch.stack(groups).mean(0), data)
    return found


def test_more_paths_tighten_the_bound_to_the_known_values():
    found = of_paths(EulerChains(100), gaussian_data(200), (1, 8, 64))
    assert found[1] == pytest.approx(2.42, abs=0.05)
    assert found[8] == pytest.approx(1.99, abs=0.05)
    assert found[64] == pytest.approx(1.88, abs=0.05)


def exact_chain(num_steps, variance="fixed_large"):
    """Return the DDPM chain of the exact posterior mean of the data."""
    times = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = vp_alpha_bar(times)

    def predict(x, n):
        abar = alpha_bar[n - 1][:, None]
        return abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * x

    return Chain(predict, alpha_bar, variance=variance)


def every_term(chain, data, noise):
    """Return the terms L_0, L_1, .. L_N of each sample (N + 1, B)."""
    first, _ = chain.data_term(data, noise(1))
    steps = [torch.full((len(data),), n) for n in range(2, chain.num_steps + 1)]
    return torch.stack(
        [first, *(chain.step_term(data, n, noise(n))[0] for n in steps), chain.prior_term(data)]
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [10, 100, 1000])
def test_the_bound_of_gaussian_data_term_by_term(num_steps, variance):
    """The expected terms, from the posterior's variance alone: no state and no noise."""
    chain, data = exact_chain(num_steps, variance), gaussian_data(1000)
    found = every_term(chain, data, noise_like(data))
    abar = torch.cat([torch.ones(1, dtype=torch.float64), chain.alpha_bar])
    error = (STD**2 * (1 - abar[1:, None]) / (abar[1:, None] * STD**2 + 1 - abar[1:, None])).sum(1)
    beta = 1 - abar[1:] / abar[:-1]
    small = beta * (1 - abar[:-1]) / (1 - abar[1:])
    width = small if variance == "fixed_small" else beta
    shift = abar[:-1] * (beta / (1 - abar[1:])) ** 2 * error
    expected = (small + shift / 2) / width - 1 + torch.log(width / small)
    expected[0] = math.log(2 * math.pi * beta[0]) + error[0] / beta[0] / 2
    prior = (abar[-1] * (STD**2 - 1) - torch.log(1 - abar[-1])).sum() / 2
    expected = torch.cat([expected, prior[None]])
    standard_error = found.std(1) / len(data) ** 0.5
    assert ((found.mean(1) - expected).abs() <= 5 * standard_error + 1e-12).all()
    assert ENTROPY < expected.sum()
    if variance == "fixed_large" and num_steps == 1000:
        assert expected.sum() < ENTROPY + 0.03


def test_one_path_has_the_mean_of_the_bound_and_more_paths_a_tighter_one():
    chain, data = exact_chain(30), gaussian_data(300)
    terms = torch.stack([every_term(chain, data, noise_like(data, k)).sum(0) for k in range(16)])
    found = of_paths(chain, data, (1, 4, 16, 64))
    assert found[1] == pytest.approx(ENTROPY + gap(-terms.mean(0), data), abs=0.02)
    assert sorted(found.values(), reverse=True) == list(found.values())
    # The limit is the model's own likelihood, whose steps back have not quite the right variance.
    assert ENTROPY < found[64] < ENTROPY + 0.06


@pytest.mark.parametrize("std", [1e-3, 0.005, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-1.5, -0.996, 0.1234, 1.0])
def test_the_discretised_decoder_is_a_distribution_over_256_values(mean, std):
    values = (torch.arange(256) / 127.5 - 1).float()[:, None]  # as the loader gives them
    logs = discretised_gaussian(
        values, torch.full((256, 1), mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    )
    assert torch.isfinite(logs).all()
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    edges = (torch.arange(1, 256, dtype=torch.float64) - 0.5) / 127.5 - 1
    cumulative = stats.norm(mean, std).cdf(edges.numpy())
    assert logs[:-1].exp().cumsum(0).numpy() == pytest.approx(cumulative, abs=1e-12)


def test_the_bound_of_a_network_is_that_of_another_computation():
    """By Gaussians of full covariance from torch.distributions, conditioned by matrices, over all steps."""
    torch.manual_seed(0)
    network = MLP(channels=3, width=16, depth=1).double().requires_grad_(False)
    alpha_bar = torch.linspace(0.97, 0.05, 12, dtype=torch.float64)
    data = (torch.randint(0, 256, (7, 3)) / 127.5 - 1).double()

    def predict(x, n):
        return network(x, n / 12, n / 12).clamp(-1, 1)

    for decoder in ("gaussian", "discretised"):
        for variance in ("fixed_small", "fixed_large"):
            chain = Chain(predict, alpha_bar, variance=variance, decoder=decoder)
            terms = every_term(chain, data, noise_like(data, 5))
            noise = noise_like(data, 5)
            drawn = {n: noise(n) for n in range(1, 13)}  # in the order in which every_term draws
            for row, point in enumerate(data):
                for n in range(13):
                    expected = reference_term(chain, point, n, {k: e[row] for k, e in drawn.items()})
                    assert terms[n, row].item() == pytest.approx(expected, abs=1e-6, rel=1e-9)
