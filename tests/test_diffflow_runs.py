"""A run of a DiffFlow is one on any number of processes, goes on from a DDPM, is measured, and teaches."""

import math
import re

import pytest
import torch

from driftmap.data.synthetic import write_points
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.models.diffflow import DiffFlow
from driftmap.models.flow_map import Process
from driftmap.models.samplers import backward, sampler_of, time_grid
from driftmap.trainer.build import build, load_model, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.guiding import usual_sampler
from driftmap.trainer.recipe import recipe_from
from drifts import exact, gaussian_data, noise_like
from runs import driftmap, launched, read_losses, write_config

PATH = {"name": "linear_betas"}
RESIDUAL = {"name": "diffflow", "path": PATH, "exponent": 1.0, "num_steps": 4}
SHARED = {"name": "diffflow", "shared": True, "flexible": True, "num_steps": [[0, 3], [2, 5]]}
SHARED |= {"learned_volatility": True, "reverse_variance": "step", "condition_dropout": 0.2}
NETWORK = {"name": "mlp", "channels": 2, "width": 16, "depth": 1, "num_classes": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder of points in two classes, a run of DDPM on them, and one of DiffFlow."""
    home = tmp_path_factory.mktemp("diffflow")
    write_points(home / "moons", "moons", n=400, seed=0)
    train(recipe(home, "ddpm", objective={"name": "ddpm"}), home / "ddpm")
    shared = recipe(home, "shared", objective=SHARED, model={**NETWORK, "out_channels": 4})
    train(shared, home / "shared")
    return home


def recipe(home, name, **changes):
    config = write_config(home / f"{name}.yaml", home / "moons", **{"model": NETWORK, **changes})
    return recipe_from(read_config(config))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", ["shared", "residual"])
def test_two_processes_are_one(home, tmp_path, strategy, objective):
    settings = {"shared": SHARED, "residual": RESIDUAL}[objective]
    network = {**NETWORK, "out_channels": 4 if objective == "shared" else 2}
    recipe(home, "pair", objective=settings, model=network)
    config, words = home / "pair.yaml", ["training.steps=3", f"strategy.name={strategy}"]
    for command in launched(2, "train", config, *words, "--out", tmp_path / "two", logs=tmp_path / "two"):
        command.succeeded()
    one = driftmap("train", config, words[0], "--out", tmp_path / "one", logs=tmp_path / "one.logs")
    one.succeeded()
    ours, theirs = read_losses(tmp_path / "two"), read_losses(tmp_path / "one")
    assert ours.keys() == theirs.keys() == {1, 2, 3}
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5, abs=1e-6)
    if objective == "shared":
        assert [theirs[step]["num_steps"] for step in theirs] == [3, 3, 5]
    for name, value in load_model(tmp_path / "one").state_dict().items():
        other = load_model(tmp_path / "two").state_dict()[name]
        assert (value - other).norm() <= 1e-5 * value.norm().clamp_min(1e-2), name


def test_a_stopped_run_goes_on_exactly(home, tmp_path):
    again = recipe(home, "shared", objective=SHARED, model={**NETWORK, "out_channels": 4})
    assert train(recipe_from(read_config(home / "shared.yaml", ["training.steps=2"])), tmp_path).finished
    assert train(again, tmp_path).finished
    for name, value in load_model(home / "shared").state_dict().items():
        assert torch.equal(value, load_model(tmp_path).state_dict()[name]), name


def test_it_goes_on_from_a_ddpm_with_its_bound(home, tmp_path):
    """Exactly its velocity; its bound is that of DDPM's chain, but for the noise of what is drawn."""
    start = recipe(home, "residual", model={"from_run": str(home / "ddpm")}, objective=RESIDUAL)
    run = build(start, tmp_path / "residual")
    x, t = gaussian_data(32).float(), torch.linspace(0.01, 1, 32)
    label = torch.arange(32) % 2
    ddpm = load_model(home / "ddpm")
    assert isinstance(run.model, DiffFlow)
    assert torch.equal(run.model.eval().velocity(x, t, label), ddpm.velocity(x, t, label))
    for one, other in zip(
        run.model.drift.inputs.parameters(), ddpm.backbone.inputs.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    slow = {"lr": 1e-12}
    train(
        recipe(home, "residual", model={"from_run": str(home / "ddpm")}, objective=RESIDUAL, optimizer=slow),
        tmp_path / "slow",
    )
    found = [
        likelihood_of_run(
            LikelihoodRequest(run, home / "moons", measures=("bound",), steps=10, variance=variance),
            tmp_path / "likelihood.json",
        )["bound_bits_per_dim"]
        for run, variance in ((home / "ddpm", "fixed_large"), (tmp_path / "slow", None))
    ]
    spread = math.hypot(*(row["standard_error"] for row in found))
    assert abs(found[0]["value"] - found[1]["value"]) < 4 * spread
    assert found[1]["N"] == 10 and found[1]["evaluations"] == 11


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("ddpm", {"path": {"name": "cosine"}}, "objective.path is"),
        ("ddpm", {"prediction": "v"}, "objective.prediction is 'noise' there; set it alike"),
        ("ddpm", {"reverse_variance": "network"}, "it has one head; set objective.shared to false"),
        ("ddpm", {"path": None}, "a network of another kind"),
        ("shared", {}, "objective.path is None there"),
    ],
)
def test_it_goes_on_from_nothing_else(home, tmp_path, source, changes, said):
    settings = {**RESIDUAL, **changes}
    other = recipe(home, "other", model={"from_run": str(home / source)}, objective=settings)
    with pytest.raises(ConfigError, match=re.escape(said)):
        build(other, tmp_path)


def test_its_bounds_are_measured_and_what_has_no_meaning_is_refused(home, tmp_path):
    def measured(**options):
        return likelihood_of_run(
            LikelihoodRequest(home / "shared", home / "moons", **options), tmp_path / "l.json"
        )

    found = measured(measures=("bound", "iw", "ode"), paths=8, solver="heun:20")
    bound, weighted = found["bound_bits_per_dim"], found["iw_bound_bits_per_dim"]
    assert weighted["value"] < bound["value"] and (bound["N"], bound["K"], weighted["K"]) == (5, 1, 8)
    assert measured(measures=("bound",), steps=9)["bound_bits_per_dim"]["evaluations"] == 10
    for option, said in (("drawn_steps", 3), ("variance", "fixed_small")):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} has no effect on"):
            measured(**{option: said})


def test_its_chain_leads_back_to_data(home):
    noise = noise_like(gaussian_data(4000), 9)(0)
    found = backward(exact(), noise, grid=time_grid(200), draw=noise_like(noise))
    assert found.std(0).tolist() == pytest.approx([1.2, 0.3], rel=0.08)
    assert usual_sampler("diffflow", 1.0) == "backward" and usual_sampler("diffflow", 2.0) == "euler"
    sampler = sampler_of("backward", path=None, draw=noise_like(noise[:8]))
    model, label = load_model(home / "shared"), torch.arange(8) % 2
    few = sampler.sample(model, noise[:8].float(), grid=sampler.grid(5), condition=label)
    own = sampler.sample(model, noise[:8].float(), grid=model.grid().flip(0), condition=label)
    assert few.isfinite().all() and torch.equal(few, own)
    with pytest.raises(ValueError, match="is the chain of a diffflow, unguided"):
        backward(load_model(home / "ddpm"), noise, grid=time_grid(5), draw=noise_like(noise))


def test_it_teaches_by_the_states_of_its_process(home, tmp_path):
    student = recipe(
        home,
        "student",
        objective={"name": "lagrangian", "velocity": "teacher"},
        teacher={"run": str(home / "shared")},
    )
    run = train(student, tmp_path / "student")
    assert run.finished and all(math.isfinite(line["loss"]) for line in read_losses(run.folder).values())
    assert isinstance(run.strategy.task._frozen[0], Process)
