"""With a path a DiffFlow begins as its network's DDPM, to the last bit, and has its bound in expectation."""

import pytest
import torch
from torch import nn

from driftmap.models.backbones.dit import DiT
from driftmap.models.backbones.mlp import MLP
from driftmap.models.backbones.unet import UNet
from driftmap.models.bound import Chain, log_weight
from driftmap.models.denoiser import Denoiser
from driftmap.models.diffflow import DiffFlow, silence
from driftmap.models.path_weight import path_weight
from driftmap.models.schedule import LinearBetas
from driftmap.trainer.build import make_network
from driftmap.trainer.objectives import diffflow
from drifts import Silent, gaussian_data, noise_like

NETWORKS = {
    "mlp": {"channels": 2, "width": 16, "depth": 1},
    "dit": {"sample_size": 4, "in_channels": 2, "width": 24, "depth": 1, "num_heads": 2},
    "unet": {"sample_size": 4, "in_channels": 2, "block_out_channels": [8, 8], "norm_num_groups": 4}
    | {"layers_per_block": 1, "head_width": 8},
}


def drawn(network):
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_a_residual_drift_starts_as_the_ddpm_to_the_last_bit(name, prediction):
    path, objective = (
        LinearBetas(),
        diffflow.DiffFlow(path=LinearBetas(), prediction=prediction, exponent=1.0),
    )
    network = {"name": name, **NETWORKS[name]}
    model = make_network({**network, "means": objective.meaning()}).double()
    denoiser = Denoiser(drawn(make_network(network).backbone), path, prediction=prediction)
    model.start_from(denoiser)
    data = torch.randn(8, *model.sample_shape).double()
    t = torch.rand(8).double()
    assert torch.equal(model.velocity(data, t), denoiser.velocity(data, t))
    grid = model.grid(20)

    def predict(x, n):
        return denoiser.end_points(x, grid[n], grid[n])[0]

    chain = Chain(predict, path.angle(grid[1:]).cos().square())
    found, _ = path_weight(model, data, grid, noise_like(data))
    assert torch.equal(found, log_weight(chain, data, noise_like(data)))


def test_a_linear_drift_has_the_bound_of_ddpm_in_expectation():
    data = gaussian_data(8000)
    path, backbone = LinearBetas(), drawn(MLP(width=8, depth=1))
    model = DiffFlow(backbone, drift=Silent(), path=path, exponent=1.0)
    grid = model.grid(10)

    def predict(x, n):
        return Denoiser(backbone, path, prediction="noise").end_points(x, grid[n], grid[n])[0]

    chain = Chain(predict, path.angle(grid[1:]).cos().square())
    with torch.no_grad():
        found = -path_weight(model, data, grid, noise_like(data))[0]
        terms = chain.prior_term(data) + chain.data_term(data, noise_like(data, 1)(1))[0]
        for n in range(2, 11):
            terms += chain.step_term(data, torch.full((len(data),), n), noise_like(data, 1)(n))[0]
    error = (found.var() / len(data) + terms.var() / len(data)).sqrt()
    assert (found.mean() - terms.mean()).abs() < 4 * error < 0.1 * terms.mean()


@pytest.mark.parametrize("network", [MLP(), DiT(sample_size=4, width=24, num_heads=2), UNet()])
def test_a_silenced_network_says_nothing(network):
    drawn(network)
    x, t = torch.randn(2, *network.sample_shape).double(), torch.rand(2).double()
    assert network(x, t, t).abs().max() > 0
    silence(network)
    assert network(x, t, t).abs().max() == 0
