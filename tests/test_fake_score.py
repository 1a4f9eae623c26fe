"""Distribution matching with a fake network: its gradient is that of the KL, its run is exact anywhere."""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distribution_matching import Movable, shifted_batch

from driftmap.data.synthetic import write_points
from driftmap.models.flow_map import FlowMap
from driftmap.trainer.build import build, check_inputs, load_flow_map, train
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.objectives.distribution_matching import DistributionMatching
from driftmap.trainer.optim import adamw
from driftmap.trainer.recipe import OptimizerSection, recipe_from
from driftmap.trainer.strategy import set_learning_rate
from oracle import exact, gaussian_batch
from runs import checkpoints, driftmap, launched, read_losses, write_config

TEACHER_MEAN, TEACHER_STD = 0.7, 0.4


def gaussian(mean: float, std: float, *, fake: tuple[float, float]) -> FlowMap:
    """Return a student whose samples are N(mean, std^2), with the exact network of a Gaussian as its fake."""
    model = FlowMap(Movable(mean=mean, std=std))
    model.fake = FlowMap(Movable(mean=fake[0], std=fake[1]))
    return model


@pytest.mark.parametrize(("mean", "std"), [(1.2, 0.4), (0.3, 0.4), (0.7, 0.8), (1.0, 0.2)])
def test_with_an_exact_fake_network_the_gradient_is_the_analytic_one(mean: float, std: float) -> None:
    """With c the spread, D(y_r) = m + (1 - r) c^2 / S_r^2 (y_r - (1 - r) m): written out, not asked for."""
    model, batch = gaussian(mean, std, fake=(mean, std)), gaussian_batch(512)
    objective = DistributionMatching(fake_network=True, one_jump=1)
    objective(model, batch, exact())["loss"].backward()
    noise, again = batch.noise(), batch.random.normal("renoise", (5,)).double()
    y, r = mean + std * noise, objective.times.sample(batch.random).double()[:, None]
    state = (1 - r) * y + r * again

    def data(m: float, c: float) -> torch.Tensor:
        return m + (1 - r) * c**2 / ((1 - r) ** 2 * c**2 + r**2) * (state - (1 - r) * m)

    g = data(mean, std) - data(TEACHER_MEAN, TEACHER_STD)
    pull = g / (y - data(TEACHER_MEAN, TEACHER_STD)).abs().mean(1, keepdim=True) / g.numel()
    # y = mean + std noise, so dy/dmean = 1 and dy/dstd = noise.
    assert model.backbone.mean.grad.item() == pytest.approx(pull.sum().item(), rel=1e-9)
    assert model.backbone.std.grad.item() == pytest.approx((pull * noise).sum().item(), rel=1e-9)
    assert model.backbone.mean.grad.item() * (mean - TEACHER_MEAN) >= -1e-3  # descent goes to the data


def test_the_student_moves_by_what_the_fake_network_says_and_not_by_its_own_diagonal() -> None:
    right = gaussian(1.2, 0.4, fake=(TEACHER_MEAN, TEACHER_STD))
    losses = DistributionMatching(fake_network=True)(right, gaussian_batch(64), exact())
    assert losses["gap_to_teacher"].max() < 1e-12  # it believes to be there
    losses["loss"].backward()
    assert right.fake is not None and right.fake.backbone.mean.grad.item() < -0.1  # and learns that it is not
    assert abs(right.backbone.mean.grad.item()) < 1e-12


def test_in_between_only_the_fake_network_learns() -> None:
    model, objective = (
        gaussian(1.2, 0.4, fake=(0.7, 0.4)),
        DistributionMatching(fake_network=True, student_every=3),
    )
    for step in range(6):
        model.zero_grad()
        batch = replace(shifted_batch(128 * step), batch_size=128)
        losses = objective(model, batch, exact())
        losses["loss"].backward()
        assert (model.backbone.mean.grad is not None) == ("gap_to_teacher" in losses) == (step in (2, 5))
        assert model.fake is not None and model.fake.backbone.mean.grad is not None


def test_training_ends_at_the_data() -> None:
    model = FlowMap(Movable(mean=1.3, std=0.7))
    objective = DistributionMatching(fake_network=True, student_every=2)
    model.fake = copy.deepcopy(model)
    section = OptimizerSection(lr=0.02, fake_lr=0.04, betas=(0.5, 0.9))
    optimizer = adamw(section, model)
    for step in range(500):
        set_learning_rate(optimizer, 0.02 * (1 - step / 500))
        optimizer.zero_grad()
        objective(model, replace(shifted_batch(128 * step), batch_size=128), exact())["loss"].backward()
        optimizer.step()
    made = objective.samples(model, gaussian_batch(2000))
    assert abs(made.mean().item() - TEACHER_MEAN) < 0.1 and abs(made.std().item() - TEACHER_STD) < 0.1


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"student_every": 2}, "student_every has no effect without a fake network"),
        ({"fake_network": True, "diagonal_weight": 2.0}, "diagonal_weight has no effect with fake_network"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        DistributionMatching(**settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    home = tmp_path_factory.mktemp("fake")
    write_points(home / "points", "moons", n=100, seed=0)
    teacher = write_config(home / "teacher.yaml", home / "points", training__steps=2)
    train(recipe_from(read_config(teacher)), home / "teacher")
    run, rule = (
        str(home / "teacher"),
        {"name": "distribution_matching", "fake_network": True, "student_every": 2},
    )
    sections = {"model": {"from_run": run}, "teacher": {"run": run}, "objective": rule}
    write_config(
        home / "config.yaml", home / "points", training__save_every=3, optimizer__fake_lr=3e-2, **sections
    )
    return home


@pytest.fixture(scope="module")
def alone(home: Path) -> Any:
    """Return a function: the run of one process with overrides."""

    @functools.cache
    def trained(*overrides: str) -> Path:
        run = home / "-".join(("alone", *overrides)).replace("=", "_")
        words = ("train", home / "config.yaml", *overrides, "--out", run)
        driftmap(*words, logs=home / f"{run.name}.logs").succeeded()
        return run

    return trained


def weights(run: Path, kind: str = "model") -> Any:
    checkpoint = newest(run)
    assert checkpoint is not None
    return checkpoint.weights(kind)


def test_each_has_its_optimizer_its_rate_and_its_count(home: Path, alone: Any) -> None:
    checkpoint = newest(alone())
    assert checkpoint is not None
    counts = [checkpoint.state[name] for name in ("step", "optimizer_updates", "fake_updates")]
    assert counts == [6, 3, 6]
    run = build(recipe_from(read_config(home / "config.yaml")), home / "rates")
    set_learning_rate(run.strategy.optimizer, 1e-2)
    rates = [group["lr"] for group in run.strategy.optimizer.param_groups]
    assert rates == pytest.approx([1e-2, 1e-2, 3e-2, 3e-2])
    student: Any = run.model
    for own, copied in zip(student.backbone.parameters(), student.fake.parameters(), strict=True):
        assert torch.equal(own, copied) and own is not copied


def test_a_large_gradient_of_the_fake_network_does_not_clip_the_students(home: Path) -> None:
    run = build(recipe_from(read_config(home / "config.yaml", ["optimizer.clip_norm=0.5"])), home / "clipped")
    strategy = run.strategy
    with strategy.accumulate():
        for name, parameter in strategy.parameters.items():
            parameter.grad = torch.full_like(parameter, 1e3 if name.startswith("fake.") else 1e-5)
        strategy.step(0.0)
    moments = {f.name: f.exp_avg for f in strategy.fragments}
    assert all(
        torch.allclose(value, torch.full_like(value, 1e-6))
        for name, value in moments.items()
        if "fake" not in name
    )


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_resumes_exactly_between_two_steps_of_the_student(home: Path, alone: Any, steps: int) -> None:
    halves = home / f"halves-{steps}"
    for more in ((f"training.steps={steps}",), ()):
        driftmap("train", home / "config.yaml", *more, "--out", halves, logs=home / "h.logs").succeeded()
    assert checkpoints(halves)["step-00000006"] == checkpoints(alone())["step-00000006"]


@pytest.mark.parametrize("overrides", [(), ("training.accumulation=2",)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(strategy: str, overrides: tuple[str, ...], home: Path, alone: Any) -> None:
    one, two = alone(), home / "-".join((strategy, *overrides)).replace("=", "_")
    words = ("train", home / "config.yaml", f"strategy.name={strategy}", *overrides, "--out", two)
    assert all(command.succeeded() for command in launched(2, *words, logs=two))
    for kind in ("model", "ema"):
        torch.testing.assert_close(weights(two, kind), weights(one, kind), rtol=0, atol=1e-5)
    assert all(abs(read_losses(two)[n]["loss"] - read_losses(one)[n]["loss"]) < 1e-5 for n in range(1, 7))


def test_a_run_goes_on_under_another_strategy(home: Path, alone: Any) -> None:
    run = home / "other"
    for number, more in ((2, ("strategy.name=fsdp", "training.steps=3")), (1, ())):
        words = ("train", home / "config.yaml", *more, "--out", run)
        assert all(command.succeeded() for command in launched(number, *words, logs=run))
    torch.testing.assert_close(weights(run), weights(alone()), rtol=0, atol=1e-5)


def test_of_a_run_that_is_read_the_student_alone_is_kept(alone: Any) -> None:
    model, saved = load_flow_map(alone()), weights(alone(), "ema")
    assert model.fake is None and not any(name.startswith("fake.") for name in model.state_dict())
    assert any(name.startswith("fake.") for name in saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_is_refused(home: Path, strategy: str) -> None:
    overrides = [f"strategy.name={strategy}"]
    with pytest.raises(
        ConfigError, match=rf"^objective\.fake_network: {strategy} has one .* use strategy ddp or fsdp"
    ):
        check_inputs(recipe_from(read_config(home / "config.yaml", overrides)))


def test_a_rate_of_no_network_is_refused(home: Path) -> None:
    overrides = ["objective.fake_network=false", "objective.student_every=1"]
    with pytest.raises(ConfigError, match=r"^optimizer\.fake_lr: 0\.03 has no effect"):
        recipe_from(read_config(home / "config.yaml", overrides))
