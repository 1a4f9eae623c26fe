"""DiffFlow's bound is the known one for Gaussian data, a wrong term is seen; without noise it is a flow."""

import math

import pytest
import torch
import zuko
from torch import nn

from driftmap.models.bound import gaussian, importance_weighted
from driftmap.models.diffflow import DiffFlow
from driftmap.models.ode_likelihood import log_density, parse_solver
from driftmap.models.path import expand
from driftmap.models.path_weight import path_weight
from driftmap.models.volatility import Constant
from drifts import STD, Silent, exact, gaussian_data, noise_like

ENTROPY = math.log(2 * math.pi * math.e) + STD.log().sum().item()
PUBLISHED = {10: 5.27, 30: 3.40, 100: 2.40, 1000: 1.87}  # nats: the bound of N steps with the exact score


def published_grid(num_steps, *, start=1e-3, power=0.9):
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return (start**power + even * (1 - start**power)) ** (1 / power)


def bound_of(model, num_steps, *, count=1000, paths=1):
    """Return the bound from K paths in nats, without the noise of which data were drawn."""
    data = gaussian_data(count)
    weights = [
        path_weight(model, data, published_grid(num_steps), noise_like(data, k))[0] for k in range(paths)
    ]
    likelihood = gaussian(data / STD, torch.zeros_like(data), torch.ones(count).double()) - STD.log().sum()
    return ENTROPY + (likelihood + importance_weighted(torch.stack(weights))).mean().item()


@pytest.mark.parametrize("num_steps", PUBLISHED)
def test_the_bound_with_the_exact_score_is_the_known_one(num_steps):
    found = bound_of(exact(), num_steps)
    assert found == pytest.approx(PUBLISHED[num_steps], abs=0.06)
    assert found > ENTROPY and (num_steps < 1000 or found < ENTROPY + 0.08)


def test_more_paths_tighten_the_bound_to_the_known_values():
    for paths, known in ((1, 2.42), (8, 1.99), (64, 1.88)):
        assert bound_of(exact(), 100, count=200, paths=paths) == pytest.approx(known, abs=0.06)


def test_the_density_of_the_flow_is_exact():
    data = gaussian_data(500)
    found, _ = log_density(exact(), data, solver=parse_solver("heun:400"), probe=None)
    likelihood = gaussian(data / STD, torch.zeros_like(data), torch.ones(500).double()) - STD.log().sum()
    assert (found - likelihood).mean().abs() < 0.01


class NoRatio(DiffFlow):
    """The bound as published: without d log(g_N / g_0)."""

    def reverse_log_density(self, x, later, said, s, t):
        """Return it without the change of g."""
        ratio = (self.square_volatility(t) / self.square_volatility(s)).log() / 2
        return super().reverse_log_density(x, later, said, s, t) + x.shape[1] * ratio


class WrongIndex(DiffFlow):
    """Steps back with the noise of their clean end."""

    def reverse_step(self, x, said, s, t):
        """Return a wrong step."""
        mean, _ = super().reverse_step(x, said, s, t)
        return mean, ((t - s) * self.square_volatility(s)).sqrt()


class WrongEnd(DiffFlow):
    """Steps back by the score of their clean end."""

    def reverse_step(self, x, said, s, t):
        """Return a wrong step."""
        return super().reverse_step(x, said._replace(score=self.backbone(x, s, s)), s, t)


@pytest.mark.parametrize("wrong", [NoRatio, WrongIndex, WrongEnd])
def test_a_wrong_term_is_seen(wrong):
    off = [abs(bound_of(exact(wrong), n) - PUBLISHED[n]) for n in (10, 30)]
    assert max(off) > 0.12
    if wrong is NoRatio:
        assert bound_of(exact(wrong), 30) == pytest.approx(-1.72, abs=0.06)


class Swirl(nn.Module):
    """A smooth velocity with a divergence."""

    sample_shape, null_label = (2,), None

    def forward(self, x, s, t, condition=None):
        """Return what it says (B, 2)."""
        turned = torch.stack([-x[:, 1], x[:, 0]], 1)
        return 0.5 * turned + 0.6 * torch.sin(x + expand(t, x)) - 0.2 * x


def test_without_noise_the_bound_is_the_likelihood_of_the_flow():
    data = gaussian_data(400)
    model = DiffFlow(Silent(), drift=Swirl(), volatility=Constant(g=0.02), exponent=1.0)
    weight, _ = path_weight(model, data, model.grid(1500), noise_like(data))
    exactly, _ = log_density(model, data, solver=parse_solver("dopri5:1e-6"), probe=None)

    def velocity(t, x):
        return Swirl()(x, t.expand(len(x)), t.expand(len(x)))

    flow = zuko.transforms.FreeFormJacobianTransform(velocity, t0=torch.tensor(0.0), t1=torch.tensor(1.0))
    end, volume = flow.call_and_ladj(data)
    theirs = gaussian(end, torch.zeros_like(end), torch.ones(len(end)).double()) + volume
    torch.testing.assert_close(exactly, theirs, rtol=1e-4, atol=1e-4)
    assert (weight - theirs).mean().abs() < 0.01
    # Not so with more noise.
    louder = DiffFlow(Silent(), drift=Swirl(), volatility=Constant(g=0.5), exponent=1.0)
    assert (path_weight(louder, data, model.grid(200), noise_like(data))[0] - theirs).mean().abs() > 0.02


def test_the_states_of_the_process_are_those_of_the_chain():
    model, data = exact(), gaussian_data(4000)
    for time in (0.0, 0.13, 0.5, 1.0):
        t = torch.full((len(data),), time).double()
        noises = {f"noise of step {n}": noise_like(data)(n) for n in range(1, 31)}
        x = model.state(data, t, draw=noises.__getitem__)
        abar = math.exp(-(0.1 * time + 19.9 * time**2 / 2))
        # Euler's 30 steps are not quite the process; without any of them the first spread would be 1.2.
        assert x.std(0).tolist() == pytest.approx((abar * STD**2 + 1 - abar).sqrt().tolist(), rel=0.12)
        if time == 0:
            assert torch.equal(x, data)
