"""The density of a flow is the exact one where the velocity is exact; what cannot be solved is refused."""

import functools
import math

import pytest
import torch
from torch.distributions import Independent, Normal

from driftmap.models.backbones.mlp import MLP
from driftmap.models.flow_map import FlowMap
from driftmap.models.ode_likelihood import Adaptive, FixedSteps, log_density
from driftmap.trainer.seeds import Random
from mixture import DATA, exact_mixture
from oracle import exact, gaussian_batch

STD = torch.tensor([1.2, 0.3], dtype=torch.float64)


class Gaussian:
    """The exact velocity of N(0, diag(STD^2)) along the variance-preserving path, beta from 0.1 to 20."""

    def velocity(self, x, t, condition=None):
        """Return -beta / 2 (x + score)."""
        t = t[:, None]
        alpha_bar = torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
        return -(0.1 + 19.9 * t) / 2 * (x - x / (alpha_bar * STD**2 + 1 - alpha_bar))


def test_gaussian_data_have_the_known_density():
    """Entropy 1.816 nats; a fixed grid of 400 Heun steps was measured before to give 1.818."""
    data = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * STD
    true = Normal(torch.zeros_like(STD), STD).log_prob(data).sum(1)
    entropy = math.log(2 * math.pi * math.e) + STD.log().sum().item()
    found, evaluations = log_density(Gaussian(), data, probe=None, solver=FixedSteps("heun", 400))
    assert evaluations == 800
    assert entropy == pytest.approx(1.816, abs=1e-3)
    assert entropy + (true - found).mean().item() == pytest.approx(1.818, abs=0.005)
    found, _ = log_density(Gaussian(), data, probe=None, solver=Adaptive(1e-6))
    # What is left is that x_1 is not quite N(0, I): alpha_bar(1) = 4e-5.
    assert (found - true).abs().max() < 2e-3


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_the_exact_flow_of_a_path_gives_the_exact_density(path):
    data = gaussian_batch(64).data
    true = Independent(Normal(torch.full((5,), 0.7).double(), 0.4), 1).log_prob(data)
    found, _ = log_density(exact(path=path), data, probe=None, solver=Adaptive(1e-9))
    assert found.numpy() == pytest.approx(true.numpy(), abs=1e-6)


@pytest.mark.parametrize(("method", "order", "cost"), [("heun", 2, 2), ("rk4", 4, 4)])
def test_a_solver_has_its_order_and_its_cost(method, order, cost):
    data = gaussian_batch(16).data
    true = Independent(Normal(torch.full((5,), 0.7).double(), 0.4), 1).log_prob(data)
    errors = []
    for steps in (16, 32):
        found, evaluations = log_density(exact(), data, probe=None, solver=FixedSteps(method, steps))
        assert evaluations == cost * steps
        errors.append((found - true).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_a_mixture_has_its_exact_density():
    torch.manual_seed(0)
    data = DATA.sample((200,))
    found, _ = log_density(exact_mixture(), data, probe=None, solver=Adaptive(1e-8))
    assert found.numpy() == pytest.approx(DATA.log_prob(data).numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_one_probe_a_solve_is_unbiased(kind):
    """The mean over many probes is the exact density; one alone is not, as the Jacobian is not diagonal."""
    mixture, count = exact_mixture(), 2000
    point = torch.tensor([[-0.2, 0.3]], dtype=torch.float64).expand(count, 2)
    normal = Random(0, torch.arange(count)).normal("probe", (2,)).double()
    probe = normal.sign() if kind == "rademacher" else normal
    found, _ = log_density(mixture, point, probe=probe, solver=FixedSteps("rk4", 20))
    exact_one, _ = log_density(mixture, point[:1], probe=None, solver=FixedSteps("rk4", 20))
    spread = found.std().item()
    assert spread > 0.01
    assert abs(found.mean().item() - exact_one.item()) < 4 * spread / count**0.5


def test_the_divergence_of_a_network_is_the_trace_of_its_jacobian():
    torch.manual_seed(0)
    model = FlowMap(MLP(channels=3, width=16, depth=1, num_classes=2)).double().requires_grad_(False)
    data, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    found, _ = log_density(model, data, condition=labels, probe=None, solver=FixedSteps("heun", 1))

    for row, label, value in zip(data, labels, found, strict=True):

        def velocity(x, t, label=label):
            return model.velocity(x[None], torch.full((1,), t).double(), label[None])[0]

        first = velocity(row, 0.0)
        end = row + (first + velocity(row + first, 1.0)) / 2
        traces = [
            torch.autograd.functional.jacobian(functools.partial(velocity, t=t), x).trace()
            for x, t in ((row, 0.0), (row + first, 1.0))
        ]
        expected = Normal(0.0, 1.0).log_prob(end).sum() + sum(traces) / 2
        assert value.item() == pytest.approx(expected.item(), abs=1e-9)


class Broken:
    """A velocity that no solver follows through t = 0.5."""

    def __init__(self, power):
        self.power = power

    def velocity(self, x, t, condition=None):
        """Return x (0.5 - t)^power."""
        return x * (0.5 - t[:, None]) ** self.power


@pytest.mark.parametrize(("power", "reason"), [(-2, "more than 100 evaluations"), (0.5, "underflow in dt")])
def test_a_flow_that_cannot_be_followed_is_said_to_be(power, reason):
    data = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=rf"beyond t = 0\.\d+ \({reason}.*\) after \d+ .* rk4:50"):
        log_density(Broken(power), data, probe=None, solver=Adaptive(1e-6, 100))
