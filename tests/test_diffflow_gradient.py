"""A DiffFlow's path has the weight of the paper's chains, autograd's gradient, and the memory of one node."""

import pytest
import torch

from driftmap.models.backbones.mlp import MLP
from driftmap.models.bound import log_weight
from driftmap.models.diffflow import DiffFlow
from driftmap.models.path_weight import path_weight
from driftmap.models.schedule import LinearBetas
from driftmap.models.volatility import Constant
from driftmap.trainer.build import make_network
from driftmap.trainer.config import ConfigError
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives import diffflow
from driftmap.trainer.seeds import Random
from driftmap.trainer.tensor_memory import TensorMemory
from drifts import LEARNED, batch_of, learned, noise_like, objective_of


class Paper:
    """The chains as the paper has them, network by network, with every learned factor."""

    def __init__(self, model, grid, condition):
        self.model, self.times, self.condition, self.num_steps = model, grid, condition, len(grid) - 1

    def said(self, x, n):
        """Return drift and all heads."""
        t = self.times[n]
        heads = self.model.backbone(x, t, t, self.condition).split(2, 1)
        drift = heads[1] if self.model.drift is None else self.model.drift(x, t, t, self.condition)
        return drift[:, :2], heads

    def square(self, n):
        """Return g^2."""
        t = self.times[n]
        square = self.model.volatility.square(t)
        learned = self.model.learned_volatility
        return square if learned is None else square * (4 * (learned(t, t) / 4).tanh()).exp()

    def forward(self, x, n):
        """Return mean and spread of a step to noise."""
        n = int(n[0])
        h = self.times[n] - self.times[n - 1]
        return x + h[:, None] * self.said(x, n - 1)[0], (h * self.square(n - 1)).sqrt()

    def reverse_log_density(self, x, later, n):
        """Return log-densities of a step back."""
        n = int(n[0])
        h, square = self.times[n] - self.times[n - 1], self.square(n)
        drift, heads = self.said(later, n)
        mean = later - h[:, None] * (drift - square[:, None] * heads[0])
        log_variance = torch.zeros_like(x)
        if self.model.widening is not None:
            log_variance += self.model.widening(self.times[n], self.times[n - 1])[:, None]
        if self.model.widened_by_network:
            log_variance += heads[-1]
        std = (h * square)[:, None].sqrt() * (2 * (log_variance / 4).tanh()).exp()
        return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


@pytest.mark.parametrize("name", [name for name in LEARNED if "residual" not in name])
def test_the_weight_of_a_path_is_that_of_the_papers_chains(name):
    model, batch = learned(name), batch_of()
    grid, noise = model.grid(7), noise_like(batch.data)
    found, _ = path_weight(model, batch.data, grid, noise, batch.condition)
    times = grid[:, None].expand(-1, len(batch.data))
    expected = log_weight(Paper(model, times, batch.condition), batch.data, noise)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LEARNED)
def test_the_gradient_is_that_of_plain_autograd(name):
    model, batch = learned(name), batch_of()
    gradients = []
    for recompute in (True, False):
        data = batch.data.clone().requires_grad_()
        weight, _ = path_weight(
            model, data, model.grid(20), noise_like(data), batch.condition, recompute=recompute
        )
        gradients.append(torch.autograd.grad(weight.mean(), [data, *model.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def most_memory(num_steps, *, recompute=True):
    """Return the most bytes of tensors in a step of the objective, its noise included."""
    objective = objective_of("two networks", num_steps=num_steps)
    model = DiffFlow(MLP(width=128), drift=MLP(width=128), volatility=Constant())
    batch = Batch(torch.randn(128, 2), None, Random(0, torch.arange(128)))
    with TensorMemory() as memory:
        if recompute:
            objective(model, batch)["loss"].backward()
        else:
            noise = diffflow.noise_of_path(batch, num_steps)
            path_weight(model, batch.data, model.grid(num_steps), noise, recompute=False)[0].mean().backward()
    return memory.most


def test_memory_does_not_grow_with_the_number_of_steps():
    assert most_memory(100) < 1.05 * most_memory(10)
    assert most_memory(100, recompute=False) > 5 * most_memory(10)


def test_a_flexible_grid_is_one_a_step_of_training_on_any_number_of_processes():
    objective, model = objective_of("two networks", flexible=True, num_steps=6), learned("two networks")
    whole = batch_of(16, batch_size=8)
    found = []
    for step in range(2):
        rows = torch.arange(8 * step, 8 * step + 8)
        parts = [Batch(whole.data[r], None, Random(0, r), 8) for r in (rows[::2], rows[1::2])]
        grids = [objective.grid(model, part) for part in parts]
        assert torch.equal(*grids) and len(grids[0]) == 7
        assert grids[0][[0, -1]].tolist() == [0, 1]
        cells = (grids[0][1:-1] ** 0.9 * 5).floor()
        assert cells.tolist() == [0, 1, 2, 3, 4]
        found.append(grids[0])
    assert not torch.equal(*found)


def test_progressive_refinement_takes_more_steps_as_training_goes_on():
    objective, model = objective_of("two networks", num_steps=((0, 3), (2, 5), (3, 8))), learned("shared")
    steps = [
        len(objective.grid(model, Batch(torch.zeros(2, 2), None, Random(0, torch.arange(2) + 4 * n), 4))) - 1
        for n in range(5)
    ]
    assert steps == [3, 3, 5, 8, 8] and len(objective.grid(model, batch_of())) == 9
    assert objective.meaning()["num_steps"] == 8
    assert model.grid(8)[1:].diff().diff().min() > 0  # steps grow towards noise


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": LinearBetas(), "volatility": Constant()}, "the path says the noise"),
        ({"prediction": "v"}, "prediction has no effect without a path"),
        ({"path": LinearBetas(), "data_std": 0.5}, "data_std has no effect on prediction noise"),
        ({"num_steps": ((5, 3), (2, 5))}, r"stages start at the steps \[5, 2\]"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        diffflow.DiffFlow(**settings)


def test_a_network_of_other_channels_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.out_channels: 2, .* the score and the drift in .* set it to 4"
    ):
        make_network({"name": "mlp", "means": diffflow.DiffFlow(shared=True).meaning()})
