"""A rule may learn from a fast mean of its own weights; such a run is exact on any processes and resumes."""

import functools
import re

import pytest
import torch

from driftmap.data.synthetic import write_points
from driftmap.trainer.build import build, check_inputs
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.hooks import update_ema
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.validation import Sampling
from runs import checkpoints, driftmap, launched, read_losses, write_config

RULE = {"name": "semigroup"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("target")
    write_points(home / "points", "moons", n=100, seed=0)
    write_config(home / "config.yaml", home / "points", objective=RULE, training__save_every=3)
    return home


@pytest.fixture(scope="module")
def alone(home):
    """Return a function: the run of one process with overrides."""

    @functools.cache
    def train(*overrides):
        run = home / "-".join(("alone", *(re.sub(r"\W", "_", text) for text in overrides)))
        words = ("train", home / "config.yaml", *overrides, "--out", run)
        driftmap(*words, logs=home / f"{run.name}.logs").succeeded()
        return run

    return train


def weights(run, kind="model"):
    checkpoint = newest(run)
    assert checkpoint is not None
    return checkpoint.weights(kind)


def test_with_decay_zero_it_is_the_network_itself(alone):
    plain, target = alone(), alone("ema.target=0")
    assert read_losses(target) == read_losses(plain)
    torch.testing.assert_close(weights(target), weights(plain), rtol=0, atol=0)
    torch.testing.assert_close(weights(target, "ema-target"), weights(plain), rtol=0, atol=0)


def test_a_slower_one_teaches_something_else(alone):
    plain, target = read_losses(alone()), read_losses(alone("ema.target=0.9"))
    assert target[1] == plain[1]  # both have the weights of the start
    assert abs(target[6]["error_jump"] - plain[6]["error_jump"]) > 1e-6
    # Nothing on the diagonal learns from it.
    assert target[2]["error_diagonal"] == plain[2]["error_diagonal"]


def test_it_holds_its_mean_after_every_step(home):
    run = build(recipe_from(read_config(home / "config.yaml", ["ema.target=0.5"])), home / "held")
    run.hooks += [update_ema, assert_held]
    with run.batches:
        run.train()
    assert run.finished


def assert_held(run, losses):
    held = list(run.target.parameters())
    torch.testing.assert_close(held, run.ema.means["ema-target"], rtol=0, atol=0)
    assert not torch.equal(held[0], next(run.model.parameters()))
    assert not any(parameter.requires_grad for parameter in held)


def test_three_steps_and_three_steps_are_six(home, alone):
    whole, halves = alone("ema.target=0.9"), home / "halves"
    for more in (("training.steps=3",), ()):
        words = ("train", home / "config.yaml", "ema.target=0.9", *more, "--out", halves)
        driftmap(*words, logs=home / "halves.logs").succeeded()
    assert checkpoints(halves) == checkpoints(whole)
    assert read_losses(halves) == read_losses(whole)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2"])
def test_two_processes_are_one(strategy, home, alone):
    one, two = alone("ema.target=0.9"), home / strategy
    words = ("train", home / "config.yaml", "ema.target=0.9", f"strategy.name={strategy}", "--out", two)
    assert all(command.succeeded() for command in launched(2, *words, logs=two))
    for kind in ("model", "ema-target"):
        torch.testing.assert_close(weights(two, kind), weights(one, kind), rtol=0, atol=1e-6)
    assert all(abs(read_losses(two)[n]["loss"] - read_losses(one)[n]["loss"]) < 1e-6 for n in range(1, 7))


def test_a_run_goes_on_under_another_strategy(home, alone):
    run = home / "other"
    for number, more in ((2, ("strategy.name=fsdp", "training.steps=3")), (1, ())):
        words = ("train", home / "config.yaml", "ema.target=0.9", *more, "--out", run)
        assert all(command.succeeded() for command in launched(number, *words, logs=run))
    torch.testing.assert_close(weights(run), weights(alone("ema.target=0.9")), rtol=0, atol=1e-6)


def test_samples_are_those_of_the_network_and_not_of_its_target(home):
    run = build(recipe_from(read_config(home / "config.yaml", ["ema.target=0.9"])), home / "sampled")
    for parameter in run.target.parameters():
        parameter.fill_(torch.nan)
    task = run.strategy.task
    with run.batches:
        batch = next(run.batches)
    assert not task(batch)["loss"].isfinite()
    task.objective = Sampling("jump", 4, 1.0)
    assert task(batch)["samples"].isfinite().all()


def test_zero3_is_refused(home):
    overrides = ["ema.target=0.9", "strategy.name=zero3"]
    with pytest.raises(ConfigError, match=r"^ema\.target: under zero3 .* use strategy fsdp"):
        check_inputs(recipe_from(read_config(home / "config.yaml", overrides)))


@pytest.mark.parametrize(
    ("objective", "used"),
    [
        ({"name": "flow_matching"}, False),
        ({"name": "ddpm"}, False),
        ({"name": "eulerian"}, False),
        ({"name": "eulerian", "direction": "self"}, True),
        ({"name": "eulerian", "velocity": "self"}, True),
        ({"name": "lagrangian"}, True),
        ({"name": "discrete_eulerian"}, True),
        ({"name": "trajectory"}, False),
        (
            {"name": "flow_matching", "condition_dropout": 0.1, "guidance": {"scale": 2.0}},
            True,
        ),
    ],
)
def test_where_nothing_would_be_asked_of_it_it_is_refused(objective, used, home):
    settings = read_config(home / "config.yaml", ["ema.target=0.9", "model.num_classes=3"])
    settings["objective"] = objective
    if used:
        assert recipe_from(settings).ema.target == 0.9
        return
    with pytest.raises(ConfigError, match=r"^ema\.target: 0\.9 has no effect, as the objective"):
        recipe_from(settings)
