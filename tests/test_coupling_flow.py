"""A discrete flow has zuko's density, an inverse, learns by likelihood, and is taken for no velocity."""

import json
import math
import sys
from functools import partial

import pytest
import torch
import zuko

from driftmap.data.synthetic import write_points
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.models.backbones.coupling_flow import CouplingFlow
from driftmap.trainer.build import build, check_inputs, load_model, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.cost import flops
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.discrete_flow import DiscreteFlow
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from runs import driftmap, losses_of_one_and_two, write_config

SPLINE = partial(zuko.transforms.MonotonicRQSTransform, slope=1e-3)
THEIRS = {"affine": {}, "spline": {"univariate": SPLINE, "shapes": [(8,), (8,), (7,)]}}
every_transform = pytest.mark.parametrize("transform", THEIRS)
MODEL = {"name": "coupling_flow", "transform": "spline", "layers": 2, "width": 16, "num_classes": 2}
OBJECTIVE = {"name": "discrete_flow", "condition_dropout": 0.2}


def drawn(transform, **settings):
    """Return a flow whose every weight is some number."""
    torch.manual_seed(0)
    model = CouplingFlow(
        transform=transform, **{"channels": 3, "layers": 4, "width": 16, **settings}
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@every_transform
def test_the_density_is_zukos(transform):
    model, x = drawn(transform), torch.randn(64, 3).double()
    theirs = zuko.flows.NICE(3, transforms=4, hidden_features=(16, 16), **THEIRS[transform]).double()
    theirs.load_state_dict(model.flow.state_dict())
    torch.testing.assert_close(model.log_density(x), theirs().log_prob(x))


@every_transform
def test_the_density_is_that_of_the_change_of_variables(transform):
    model = drawn(transform, num_classes=2)
    noise, labels = torch.randn(64, 3).double(), torch.arange(64) % 3
    x = model.samples(noise, labels)
    for label, z, found in list(zip(labels, noise, model.log_density(x, labels), strict=True))[:6]:
        jacobian = torch.autograd.functional.jacobian(
            lambda one, label=label: model.samples(one[None], label[None])[0], z
        )
        expected = -z.square().sum() / 2 - 1.5 * math.log(2 * math.pi) - jacobian.det().abs().log()
        assert found.item() == pytest.approx(expected.item(), abs=1e-8)
    missing = model.log_density(x[labels == 2])
    torch.testing.assert_close(missing, model.log_density(x[labels == 2], labels[labels == 2]))
    assert (model.log_density(x, labels) - model.log_density(x, (labels + 1) % 3)).abs().max() > 0.01


def test_it_learns_a_ring_to_a_density_that_sums_to_one():
    torch.manual_seed(0)
    model = CouplingFlow(transform="spline", layers=4, width=32)
    optimizer, nats = torch.optim.Adam(model.parameters(), lr=5e-3), []
    for step in range(200):
        index = torch.arange(256 * step, 256 * step + 256)
        normal = Random(0, index).normal("data", (2,))
        data = normal / normal.norm(dim=1, keepdim=True) + 0.1 * Random(0, index).normal("blur", (2,))
        losses = DiscreteFlow()(model, Batch(data, None, Random(0, index)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        nats.append(losses["nats"].item())
    gaussian = math.log(2 * math.pi * math.e) + math.log(0.51)  # of the spread of the ring
    assert sum(nats[-20:]) / 20 < gaussian - 0.5
    axis = torch.linspace(-4, 4, 161)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = model.log_density(grid).exp().sum() * (8 / 160) ** 2
        samples = model.samples(Random(1, torch.arange(2000)).normal("noise", (2,)))
    assert mass.item() == pytest.approx(1, abs=0.05)
    assert samples.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder of points in two classes and a short run on them."""
    folder = tmp_path_factory.mktemp("discrete-flow")
    write_points(folder / "moons", "moons", n=200, seed=0)
    train(recipe(folder, "run", objective=OBJECTIVE), folder / "run")
    return folder


def recipe(home, name, **changes):
    config = write_config(home / f"{name}.yaml", home / "moons", **{"model": MODEL, **changes})
    return recipe_from(read_config(config))


def test_a_run_is_measured_and_goes_on(home, tmp_path):
    words = ("likelihood", home / "run", "--data", home / "moons")
    driftmap(*words, logs=tmp_path / "logs").succeeded()
    found = json.loads((home / "run" / "likelihood.json").read_text())
    assert [key for key in found if key.endswith("_bits_per_dim")] == ["exact_bits_per_dim"]
    model = load_model(home / "run")
    assert isinstance(model, CouplingFlow)
    again = build(recipe(home, "again", model={"from_run": str(home / "run")}, objective=OBJECTIVE), tmp_path)
    for one, other in zip(again.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert flops(recipe(home, "run", objective=OBJECTIVE)) > 0


def test_two_processes_train_what_one_does(home, tmp_path):
    recipe(home, "pair", objective=OBJECTIVE, training={"steps": 3, "save_every": 3, "log_every": 1})
    one, two = losses_of_one_and_two(home / "pair.yaml", tmp_path)
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)


def test_what_has_no_meaning_is_refused(home, tmp_path):
    for option, said in (
        ({"measures": ("bound",)}, "--measures bound: .* has exact alone, as its density is known"),
        ({"solver": "rk4:5"}, "--solver has no effect without the measure ode"),
    ):
        with pytest.raises(ConfigError, match=said):
            likelihood_of_run(LikelihoodRequest(home / "run", home / "moons", **option), tmp_path / "l.json")
    network = {"name": "mlp", "channels": 2}
    for changes, said in (
        ({"model": network, "objective": {"name": "lagrangian"}}, r"teacher\.run: .* holds no flow map"),
        ({"objective": OBJECTIVE}, "the objective 'discrete_flow' has no use for one"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_inputs(recipe(home, "refused", teacher={"run": str(home / "run")}, **changes))
    with pytest.raises(ConfigError, match="'mlp' is a flow_map, but the objective 'discrete_flow'"):
        recipe(home, "refused", model=network, objective=OBJECTIVE)
    for settings, said in (
        ({"channels": 1}, "channels is 1; a coupling layer splits 2 or more"),
        ({"bins": 4}, "bins is 4, but only splines have some; set transform to spline"),
    ):
        with pytest.raises(ValueError, match=said):
            CouplingFlow(**settings)


def test_without_zuko_there_is_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ValueError, match=r"zuko, which is not installed; pip install 'driftmap\[flows\]'"):
        CouplingFlow()
