"""What the tests of DiffFlow share: Gaussian data, noise that can be asked for again, models of all kinds."""

import torch
from torch import nn

from driftmap.models.diffflow import DiffFlow
from driftmap.models.path import expand
from driftmap.models.schedule import LinearBetas
from driftmap.models.volatility import Exponential, LinearSquare
from driftmap.trainer.build import make_network
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives import diffflow
from driftmap.trainer.seeds import Random

STD = torch.tensor([1.2, 0.3], dtype=torch.float64)  # of Gaussian data of mean zero


def gaussian_data(count):
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(10_000)) * STD


def noise_like(data, seed=0):
    """Return noise by step, the same whenever it is asked for."""

    def noise(n):
        return torch.randn(
            data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + n)
        )

    return noise


VP = LinearSquare()


class Drift(nn.Module):
    """The drift of the variance-preserving process."""

    def forward(self, x, s, t, condition=None):
        """Return what it says (B, 2)."""
        return -x * expand(VP.square(t), x) / 2


class Score(nn.Module):
    """The exact score of Gaussian data in that process."""

    sample_shape, null_label = (2,), None

    def forward(self, x, s, t, condition=None):
        """Return what it says (B, 2)."""
        abar = expand(torch.exp(-(0.1 * t + 19.9 * t**2 / 2)), x)
        return -x / (abar * STD**2 + 1 - abar)


def exact(kind=DiffFlow):
    return kind(Score(), drift=Drift(), volatility=VP)


LEARNED = {
    "two networks": {},
    "shared": {"shared": True},
    "learned g": {"volatility": Exponential(), "learned_volatility": True},
    "by step": {"reverse_variance": "step"},
    "by network": {"reverse_variance": "network", "shared": True},
    "residual": {"path": LinearBetas(), "prediction": "v", "data_std": 0.7, "exponent": 1.0},
    "residual by network": {"path": LinearBetas(), "reverse_variance": "network"},
}


def objective_of(name, **settings):
    return diffflow.DiffFlow(**{**LEARNED[name], **settings})


def learned(name, **settings):
    """Return a model in float64 whose parameters are all drawn, so that nothing is 0 any more."""
    objective = objective_of(name, **settings)
    heads = 1 + objective.shared + (objective.reverse_variance == "network")
    network = {"name": "mlp", "width": 12, "depth": 1, "num_classes": 3, "out_channels": 2 * heads}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network({**network, "means": objective.meaning()}).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(count=16, **settings):
    index = torch.arange(count)
    data = 0.5 * Random(1, index).normal("data", (2,)).double()
    return Batch(data, index % 3, Random(0, index), **settings)


class Silent(nn.Module):
    """A network that says 0."""

    sample_shape, null_label = (2,), None

    def forward(self, x, s, t, condition=None):
        """Return zeros like x."""
        return torch.zeros_like(x)
