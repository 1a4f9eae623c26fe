"""Optimal transport gives each sample the nearest noise that its batch can spare, and changes no more."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftmap.models.condition import Text
from driftmap.models.flow_map import FlowMap
from driftmap.trainer.config import checked
from driftmap.trainer.coupling import coupled
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.flow_matching import FlowMatching
from oracle import Recording, exact, gaussian_batch


def cost(batch: Batch) -> float:
    return (batch.data - batch.noise()).square().sum().item()


def test_no_other_exchange_makes_shorter_paths() -> None:
    batch = gaussian_batch(6)
    found = coupled(batch, "optimal_transport")
    noise = batch.noise()
    costs = [(batch.data - noise[list(order)]).square().sum().item() for order in permutations(range(6))]
    assert cost(found) == pytest.approx(min(costs)) and cost(found) < cost(batch)
    assert coupled(batch, "independent") is batch


def test_the_noise_of_the_batch_is_exchanged_and_the_data_stay() -> None:
    batch = gaussian_batch(200, labels=True)
    found = coupled(batch, "optimal_transport")
    assert found.data is batch.data and found.condition is batch.condition
    assert torch.equal(found.random.index.sort().values, batch.random.index)
    assert torch.equal(found.noise(), batch.noise()[found.random.index])
    labels = batch.condition
    assert isinstance(labels, torch.Tensor)
    assert torch.equal(labels[found.random.index], labels)  # within a class only
    assert cost(found) < 0.9 * cost(batch)


class Straight(nn.Module):
    """The velocity of data = 0.7 + 0.4 noise, in one dimension the transport of a whole distribution."""

    null_label = None

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return noise - data (B, 1)."""
        time = s[:, None]
        return 0.6 * (x - (1 - time) * 0.7) / ((1 - time) * 0.4 + time) - 0.7


def test_the_flow_becomes_straight() -> None:
    """The loss of the best velocity is what its target varies by, given the state: here next to nothing."""
    batch = gaussian_batch(256, dimensions=1)
    independent = FlowMatching()(FlowMap(Recording()), batch)["loss"].item()
    transported = FlowMatching(coupling="optimal_transport")(FlowMap(Straight()), batch)["loss"].item()
    assert independent > 0.4 and transported < 0.02
    found = coupled(batch, "optimal_transport")
    assert torch.equal(found.noise()[:, 0].argsort(), batch.data[:, 0].argsort())


def test_a_large_batch_exchanges_in_groups() -> None:
    found = coupled(gaussian_batch(600), "optimal_transport").random.index
    for start in (0, 256, 512):
        group = torch.arange(start, min(start + 256, 600))
        assert torch.equal(found[group].sort().values, group)


def test_an_error_keeps_the_position_of_its_data() -> None:
    batch, backbone = gaussian_batch(64), Recording()
    losses = FlowMatching(coupling="optimal_transport")(FlowMap(backbone), batch)
    assert torch.equal(losses["index"], batch.random.index)
    t, ((x, s, _, _),) = losses["time"], backbone.calls
    assert torch.equal(s, t)
    noise = (x - (1 - t)[:, None] * batch.data) / t[:, None]
    torch.testing.assert_close(noise, coupled(batch, "optimal_transport").noise(), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    batch = gaussian_batch(4)
    captions = Batch(batch.data, Text(torch.zeros(4, 2, 3), torch.ones(4, 2).bool()), batch.random)
    with pytest.raises(ValueError, match="exchanges noise within a class, and captions are no classes"):
        coupled(captions, "optimal_transport")
    with pytest.raises(
        ValueError, match="leads to other states than the teacher's flow; set it to independent"
    ):
        FlowMatching(coupling="optimal_transport")(exact(), batch, exact())


def test_a_config_asks_for_it() -> None:
    found: Any = checked(FlowMatching, {"coupling": "optimal_transport"}, place="objective")
    assert found.coupling == "optimal_transport" and FlowMatching().coupling == "independent"
