"""A flow trained by likelihood has the likelihood and gradient it says, one probe a solve, and a budget."""

import json
import math

import pytest
import torch
import zuko
from latents import write_latents
from torch.nn.utils import parameters_to_vector

from driftmap.data.synthetic import write_points
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.models.backbones.mlp import MLP
from driftmap.models.bound import gaussian
from driftmap.models.continuous_flow import ContinuousFlow as Flow
from driftmap.models.ode_likelihood import Adaptive, log_density
from driftmap.trainer.build import check_inputs, load_model, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.likelihood import probe_of, usual_probe
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.continuous_flow import ContinuousFlow
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from oracle import exact, gaussian_batch
from runs import driftmap, losses_of_one_and_two, read_losses, write_config

MODEL = {"name": "mlp", "channels": 2, "width": 16, "depth": 1, "num_classes": 2}
OBJECTIVE = {"name": "continuous_flow", "solver": "rk4:3", "condition_dropout": 0.2}


def flow(channels=3, *, size=0.3):
    """Return a flow whose every weight is some number."""
    torch.manual_seed(0)
    model = Flow(MLP(channels=channels, width=12, depth=1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
    return model


def losses_of(model, batch, **settings):
    """Return what the objective says, and its gradient as one vector."""
    losses = ContinuousFlow(**settings)(model, batch)
    return losses, parameters_to_vector(torch.autograd.grad(losses["loss"], list(model.parameters())))


def test_the_loss_of_the_exact_flow_is_the_entropy():
    batch = gaussian_batch(4000)
    losses = ContinuousFlow(solver="dopri5:1e-7")(exact(), batch)
    own = ((batch.data - 0.7) / 0.4).square().sum(1).mean() / 2 + 5 * math.log(0.4 * math.sqrt(2 * math.pi))
    assert losses["nats"].item() == pytest.approx(own.item(), abs=1e-5)
    assert losses["loss"].item() == pytest.approx(own.item() / 5, abs=1e-5)


def test_the_likelihood_is_that_of_zuko():
    model, data = flow(), gaussian_batch(32, dimensions=3).data
    found, _ = log_density(model, data, probe=None, solver=Adaptive(1e-8))

    def velocity(t, x):
        return model.velocity(x, t.expand(len(x)))

    theirs = zuko.transforms.FreeFormJacobianTransform(
        velocity, t0=torch.tensor(0.0), t1=torch.tensor(1.0), atol=1e-8, rtol=1e-8
    )
    end, volume = theirs.call_and_ladj(data)
    expected = gaussian(end, torch.zeros_like(end), torch.ones(32).double()) + volume
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("probe", ["exact", "rademacher"])
@pytest.mark.parametrize("penalties", [{}, {"kinetic": 0.1, "jacobian": 0.2}])
def test_the_adjoint_gradient_is_that_of_autograd(probe, penalties):
    model, batch = flow(), gaussian_batch(16, dimensions=3)
    adjoint, found = losses_of(model, batch, solver="dopri5:1e-9", probe=probe, **penalties)
    backprop, expected = losses_of(model, batch, solver="rk4:40", probe=probe, **penalties)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert adjoint["loss"].item() == pytest.approx(backprop["loss"].item(), abs=1e-7)
    assert backprop["evaluations"] == 160 != adjoint["evaluations"]
    plain, _ = losses_of(model, batch, solver="rk4:40", probe=probe)
    assert (plain["loss"].item() == backprop["loss"].item()) == (not penalties)


def test_even_a_coarse_grid_has_the_gradient_of_what_it_computes():
    model, batch = flow(), gaussian_batch(8, dimensions=3)
    _, gradient = losses_of(model, batch, solver="heun:2")
    direction = gradient / gradient.norm()
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            place = 0
            for parameter in model.parameters():
                part = direction[place : place + parameter.numel()]
                parameter += step * part.reshape(parameter.shape)
                place += parameter.numel()
            ends.append(ContinuousFlow(solver="heun:2")(model, batch)["loss"].item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(gradient.norm().item(), rel=1e-6)


class Counting(Random):
    """Random numbers that remember what they were asked for."""

    purposes: list[str]

    def uniform(self, purpose, shape=()):
        """Return what it would be otherwise."""
        self.purposes.append(purpose)
        return super().uniform(purpose, shape)


def test_there_is_one_probe_a_sample_and_solve():
    model, plain = flow(20), gaussian_batch(16, dimensions=20)
    random = Counting(plain.random.seed, plain.random.index)
    random.__dict__["purposes"] = []
    batch = Batch(plain.data, None, random)
    losses, gradient = losses_of(model, batch, solver="dopri5:1e-5")
    assert losses["evaluations"] > 10 and random.purposes == ["probe"]
    again, other = losses_of(model, plain, solver="dopri5:1e-5")
    assert torch.equal(losses["loss"], again["loss"]) and torch.equal(gradient, other)
    probe = probe_of("rademacher", plain)
    assert probe is not None and set(probe.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(probe[3:5], probe_of("rademacher", plain.take(torch.tensor([3, 4]))))
    assert (usual_probe((16,)), usual_probe((17,)), usual_probe((1, 5, 5))) == ("exact", *["rademacher"] * 2)


def test_a_budget_stops_the_solve_and_the_run_says_what_to_do(tmp_path):
    """The evaluations of the adjoint equation count, too; a run with a larger budget goes on."""
    model, batch = flow(), gaussian_batch(16, dimensions=3)
    losses = ContinuousFlow(solver="dopri5:1e-6")(model, batch)
    forward = int(losses["evaluations"])
    with pytest.raises(FloatingPointError, match=f"more than {forward - 1} evaluations of the velocity"):
        ContinuousFlow(solver="dopri5:1e-6", max_evaluations=forward - 1)(model, batch)
    enough = ContinuousFlow(solver="dopri5:1e-6", max_evaluations=forward)(model, batch)["loss"]
    with pytest.raises(FloatingPointError, match="the flow has become stiff, and objective.max_eval"):
        enough.backward()
    write_points(tmp_path / "moons", "moons", n=100, seed=0)
    objective = {"name": "continuous_flow", "solver": "dopri5:1e-5", "max_evaluations": 10}
    config = write_config(tmp_path / "flow.yaml", tmp_path / "moons", objective=objective)
    said = driftmap("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs").refused()
    assert "after 11 evaluations" in said and "Start again with a lower optimizer.lr, with penalties" in said
    more = recipe_from(read_config(config, ["objective.max_evaluations=900"]))
    assert train(more, tmp_path / "run").finished
    with pytest.raises(ConfigError, match="max_evaluations has no effect on rk4:4, whose steps are counted"):
        recipe_from(read_config(config, ["objective.solver=rk4:4"]))


def test_it_learns_a_gaussian():
    torch.manual_seed(0)
    model, objective = Flow(MLP(channels=2, width=16, depth=1)), ContinuousFlow(solver="heun:4", kinetic=1e-3)
    optimizer, nats = torch.optim.Adam(model.parameters(), lr=1e-2), []
    spread = torch.tensor([[0.5, 0.1], [0.0, 0.3]])
    for step in range(100):
        index = torch.arange(128 * step, 128 * step + 128)
        data = Random(0, index).normal("data", (2,)) @ spread
        losses = objective(model, Batch(data, None, Random(0, index)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        nats.append(losses["nats"].item())
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5 * 0.3)
    assert nats[0] > entropy + 0.8 and sum(nats[-20:]) / 20 == pytest.approx(entropy, abs=0.1)
    assert "penalty" in losses


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder of points in two classes and a short run on them."""
    folder = tmp_path_factory.mktemp("continuous-flow")
    write_points(folder / "moons", "moons", n=200, seed=0)
    train(recipe(folder, "teacher", objective=OBJECTIVE), folder / "teacher")
    return folder


def recipe(home, name, **changes):
    config = write_config(home / f"{name}.yaml", home / "moons", **{"model": MODEL, **changes})
    return recipe_from(read_config(config))


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_train_what_one_does(home, tmp_path, strategy):
    recipe(home, "pair", objective=OBJECTIVE, training={"steps": 3, "save_every": 3, "log_every": 1})
    one, two = losses_of_one_and_two(home / "pair.yaml", tmp_path, f"strategy.name={strategy}")
    assert one.keys() == two.keys() == {1, 2, 3} and one[1]["evaluations"] == 12
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)


def test_its_states_are_those_of_the_flow_and_its_jumps_those_of_the_velocity(home):
    model = load_model(home / "teacher")
    assert isinstance(model, Flow)
    data, label = gaussian_batch(16, dimensions=2).data.float(), torch.arange(16) % 2
    start, t = torch.zeros(16), torch.linspace(0, 1, 16)
    assert torch.equal(model.state(data, start, condition=label), data)
    state = model.state(data, t, condition=label)
    before, after = (model.state(data, t + step, condition=label) for step in (-1e-3, 1e-3))
    slope = (after - before) / 2e-3
    torch.testing.assert_close(slope, model.velocity(state, t, label), rtol=1e-2, atol=1e-3)
    assert torch.equal(model.mean_velocity(data, t, start, label), model.velocity(data, t, label))


def test_what_has_no_meaning_is_refused(home, tmp_path):
    for option, said in (
        ({"measures": ("bound",)}, "has ode alone, as it is a flow without noise, so that there is no bound"),
        ({"measures": ("exact",)}, "has ode alone"),
        ({"steps": 10}, "--steps has no effect without the measure bound or iw"),
    ):
        with pytest.raises(ConfigError, match=said):
            likelihood_of_run(
                LikelihoodRequest(home / "teacher", home / "moons", **option), tmp_path / "l.json"
            )
    path = {"objective": {"name": "semigroup", "path": {"name": "trig"}}}
    student = recipe(home, "refused", teacher={"run": str(home / "teacher")}, **path)
    with pytest.raises(ConfigError, match="no state of it is seen along another path"):
        check_inputs(student)
    write_latents(tmp_path / "latents")
    dit = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 16, "depth": 1, "num_heads": 2}
    config = write_config(tmp_path / "dit.yaml", tmp_path / "latents", model=dit, objective=OBJECTIVE)
    for words, said in (
        (["strategy.name=fsdp"], "strategy.name: fsdp has let go of the parameters"),
        (["training.compile=true"], "inductor cannot compile the gradient of objective 'continuous_flow'"),
        (["training.attention=jvp_flash"], "only math has the second derivative"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_inputs(recipe_from(read_config(config, ["objective.condition_dropout=0", *words])))


def test_from_likelihood_to_a_flow_map_by_commands(home, tmp_path):
    """It is measured, and a flow map learns of it at the states of its own flow."""
    words = ("likelihood", home / "teacher", "--data", home / "moons", "--solver", "rk4:20")
    driftmap(*words, logs=tmp_path / "logs").succeeded()
    found = json.loads((home / "teacher" / "likelihood.json").read_text())
    assert [key for key in found if key.endswith("_bits_per_dim")] == ["ode_bits_per_dim"]
    assert found["ode_bits_per_dim"]["evaluations"] == 80 and 0.5 < found["ode_bits_per_dim"]["nats"] < 10
    teacher = {"run": str(home / "teacher"), "guidance": 1.5}
    recipe(home, "student", objective={"name": "lagrangian"}, teacher=teacher)
    words = ("train", home / "student.yaml", "--out", tmp_path / "student")
    driftmap(*words, logs=tmp_path / "logs").succeeded()
    assert all(math.isfinite(line["loss"]) for line in read_losses(tmp_path / "student").values())
