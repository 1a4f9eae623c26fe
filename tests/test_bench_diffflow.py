"""What `bench diffflow` times beside ours computes the same loss and the same gradient."""

import torch
from torch.nn.utils import parameters_to_vector

from driftmap.launch.bench_diffflow import diffflow, model_of, simulated_again
from driftmap.models.path_weight import path_weight
from driftmap.trainer.objectives.diffflow import DiffFlow
from drifts import gaussian_data, noise_like


def test_the_reference_has_our_gradient():
    model = model_of(DiffFlow(num_steps=6)).double()
    data, grid = gaussian_data(20), model.grid()
    weight, _ = path_weight(model, data, grid, noise_like(data))
    parameters = [*model.drift.parameters(), *model.backbone.parameters()]
    expected = parameters_to_vector(torch.autograd.grad(-weight.sum(), parameters))
    loss, found = simulated_again(model.drift, model.backbone, data, grid, g=0.0447, noise=noise_like(data))
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    constant = 20 * torch.log(torch.tensor(2 * torch.pi).double())  # of N(0, I), in two dimensions
    torch.testing.assert_close(loss + constant, -weight.sum().detach())


def test_networks_are_as_large_as_published_and_every_row_is_there():
    sizes = [
        sum(p.numel() for p in model_of(DiffFlow(shared=shared)).parameters()) for shared in (False, True)
    ]
    assert abs(sizes[0] / 2 - 99_700) < 1_000 and abs(sizes[1] - 99_700) < 1_000
    rows = diffflow(rounds=3, batch_size=4, num_steps=2)
    assert [row["name"].partition(",")[0] for row in rows] == ["two networks", "shared trunk"]
    assert all(row["unit"] == "s/node" and row["ratio"] > 0 for row in rows)
