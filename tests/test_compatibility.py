"""What does not go together is refused before anything is built; what is not refused works."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from driftmap.data.synthetic import write_points
from driftmap.models.flow_map import FlowMap
from driftmap.models.layers import Stage
from driftmap.trainer.blocks import blocks, set_up_blocks
from driftmap.trainer.build import make_network
from driftmap.trainer.compatibility import check_compatibility
from driftmap.trainer.config import ConfigError
from driftmap.trainer.latents import Preparation
from driftmap.trainer.loop import Task
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.self_test import check_tangent
from driftmap.trainer.tangent import time_derivative
from runs import driftmap, write_config

DIT = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 16, "depth": 3, "num_heads": 2}
MLP = {"name": "mlp", "channels": 2, "width": 16, "depth": 2}
OBJECTIVES = {
    "none": {"name": "flow_matching"},
    "finite_difference": {"name": "lagrangian", "derivative": "finite_difference"},
    "forward": {"name": "lagrangian", "gradient": "semigradient"},
    "forward_with_gradient": {"name": "lagrangian"},
}


def recipe(*, tangent="none", model=DIT, strategy="ddp", **training):
    return recipe_from(
        {
            "data": {"shards": "nowhere", "batch_size": 8},
            "model": model,
            "objective": OBJECTIVES[tangent],
            "optimizer": {"lr": 1e-3},
            "strategy": {"name": strategy},
            "training": {"steps": 2, **training},
        }
    )


def problems(found):
    try:
        check_compatibility(found, make_network(found.model))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("tangent", OBJECTIVES)
def test_an_objective_says_what_it_differentiates(tangent):
    assert recipe(tangent=tangent).objective.tangent == tangent


REFUSED = [
    ({"tangent": "forward_with_gradient", "strategy": "zero3"}, "use strategy fsdp or zero2"),
    ({"tangent": "forward", "strategy": "zero3", "model": MLP}, "not built of stages"),
    ({"tangent": "forward", "attention": "xformers"}, "use sdpa, math or jvp_flash"),
    ({"tangent": "forward_with_gradient", "attention": "xformers"}, "use sdpa, math or jvp_flash"),
    ({"tangent": "forward_with_gradient", "compile": True}, "set it to false"),
    ({"strategy": "zero1", "precision": "fp16"}, "use bf16"),
    ({"strategy": "fsdp", "channels_last": True}, "or use ddp"),
    ({"strategy": "zero2", "channels_last": True}, "or use ddp"),
    ({"model": MLP, "attention": "math"}, "no attention whose form can be chosen"),
]


@pytest.mark.parametrize(("settings", "advice"), REFUSED)
def test_what_does_not_work_is_refused_with_what_to_change(settings, advice):
    (problem,) = problems(recipe(**settings))
    assert advice in problem


def test_every_problem_is_told_at_once():
    found = problems(
        recipe(tangent="forward_with_gradient", strategy="zero3", compile=True, precision="fp16")
    )
    assert len(found) == 3


STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
NOT_REFUSED = [
    case for case in itertools.product(OBJECTIVES, STRATEGIES) if case != ("forward_with_gradient", "zero3")
]


@pytest.mark.parametrize(("tangent", "strategy"), NOT_REFUSED)
def test_what_works_is_not_refused(tangent, strategy):
    """The matrix of test_strategies.py runs these."""
    assert problems(recipe(tangent=tangent, strategy=strategy, attention="math", recompute_every=1)) == []


def test_check_refuses_before_anything_is_trained(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    config = write_config(tmp_path / "config.yaml", points, training__attention="math")
    message = driftmap("train", config, "--check", logs=tmp_path / "logs").refused()
    assert "training.attention" in message
    message = driftmap("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs").refused()
    assert "training.attention" in message and not (tmp_path / "run").exists()


# What is done to blocks


def moved(**training) -> nn.Module:
    torch.manual_seed(0)
    found = recipe(**training)
    model = make_network(found.model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    set_up_blocks(model, found.training)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of a loss with the value and its derivative in the target time."""
    assert isinstance(model, FlowMap)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 4, 4, generator=generator)
    s, t = torch.rand(4, generator=generator), torch.rand(4, generator=generator)
    value, slope = time_derivative(lambda time: model.mean_velocity(x, s, time), t, how="forward")
    (value + slope).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("training", [{"recompute_every": 1}, {"recompute_every": 2}, {"attention": "math"}])
def test_gradients_through_the_derivative_stay_the_same(training):
    for one, other in zip(gradients(moved(**training)), gradients(moved()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("every", "calls"), [(None, 3), (1, 6), (2, 5)])
def test_every_nth_block_is_computed_twice(every, calls, monkeypatch):
    from driftmap.models.backbones import dit

    counted, compute = [], dit.Block.compute
    monkeypatch.setattr(dit.Block, "compute", lambda *inputs: (counted.append(1), compute(*inputs))[1])
    model = moved(recompute_every=every)
    assert isinstance(model, FlowMap)
    x, time = torch.randn(2, 2, 4, 4), torch.rand(2)
    model.velocity(x, time).sum().backward()
    assert len(counted) == calls


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    plain, compiled = moved(), moved(compile=True)
    x, time = torch.randn(2, 2, 4, 4), torch.rand(2)
    for model in (plain, compiled):
        assert isinstance(model, FlowMap)
        model.velocity(x, time).square().sum().backward()
    assert all(block._compiled_call_impl is not None for block in blocks(compiled))
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


# The start-up self-test


class WrongDerivative(torch.autograd.Function):
    """The identity, whose forward-mode rule is 10 % too large."""

    @staticmethod
    def forward(context, x):  # noqa: D102
        return x.clone()

    @staticmethod
    def jvp(context, direction):  # noqa: D102
        return 1.1 * direction


class Broken(Stage):
    """A block that changes nothing but the derivative."""

    num_inputs = 2

    def compute(self, tokens: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        return WrongDerivative.apply(tokens)


class Alone:
    """A strategy of one process, as far as the self-test needs one."""

    def __init__(self, task):
        self.task = task
        self.world = SimpleNamespace(any=bool)


@pytest.mark.parametrize("broken", [False, True])
def test_a_wrong_derivative_is_seen_on_one_batch(broken):
    model = moved()
    if broken:
        model.backbone.blocks.append(Broken())
    prepare = Preparation(0, torch.device("cpu"))
    task = Task(model, Lagrangian(), prepare=prepare)
    samples = {"index": torch.arange(8), "data": torch.randn(8, 2, 4, 4)}
    objective = task.objective
    if broken:
        with pytest.raises(RuntimeError, match=r"differs from a central difference by \d"):
            check_tangent(Alone(task), task, samples)
    else:
        check_tangent(Alone(task), task, samples)
    assert task.objective is objective
