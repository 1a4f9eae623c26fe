"""A run of a learned process teaches by its own states, is measured, and is taken for nothing else."""

import json
import re

import pytest
import torch

from driftmap.data.synthetic import write_points
from driftmap.launch.export import export
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.models.denoiser import InProcess
from driftmap.models.flow_map import Process
from driftmap.models.neural_flow import LearnedFlow
from driftmap.models.path import LogLinear
from driftmap.models.samplers import sampler_of
from driftmap.trainer.build import build, check_inputs, load_model, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.cost import flops
from driftmap.trainer.objective import Batch, path_velocity
from driftmap.trainer.objectives.distribution_matching import DistributionMatching
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from runs import losses_of_one_and_two, read_losses, write_config

OBJECTIVE = {"name": "neural_flow", "volatility": "learned", "transform": {"width": 16}}
PATH = {"name": "log_linear"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder of points in two classes and a short run on them."""
    folder = tmp_path_factory.mktemp("neural-flow")
    write_points(folder / "moons", "moons", n=400, seed=0)
    train(recipe(folder, "teacher", objective={**OBJECTIVE, "condition_dropout": 0.2}), folder / "teacher")
    return folder


def recipe(home, name, **changes):
    model = {"name": "mlp", "channels": 2, "width": 16, "depth": 1, "num_classes": 2}
    config = write_config(home / f"{name}.yaml", home / "moons", **{"model": model, **changes})
    return recipe_from(read_config(config))


def test_a_run_keeps_its_process_and_goes_on_in_its_like(home, tmp_path):
    model = load_model(home / "teacher")
    assert isinstance(model, LearnedFlow) and isinstance(model, Process) and model.transform is not None
    assert any(value.abs().max() > 0 for value in model.transform.layers[-1].parameters())
    again = recipe(home, "again", model={"from_run": str(home / "teacher")}, objective=OBJECTIVE)
    with pytest.raises(ConfigError, match="is part of a neural_flow and says something else"):
        build(
            recipe(home, "other", model={"from_run": str(home / "teacher")}, objective={"name": "ddpm"}),
            tmp_path,
        )
    started = build(again, tmp_path / "again").model
    for one, other in zip(started.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert flops(again) > 0


@pytest.mark.parametrize("teacher", [{}, {"guidance": 2.0}, {"precision": "bf16"}])
@pytest.mark.parametrize(
    "name", ["semigroup", "lagrangian", "eulerian", "discrete_eulerian", "flow_matching"]
)
def test_it_teaches_by_the_states_of_its_own_process(home, tmp_path, name, teacher):
    velocity = {"velocity": "teacher"} if "eulerian" in name else {}
    section = {"teacher": {"run": str(home / "teacher"), **teacher}}
    student = recipe(home, "student", objective={"name": name, "path": PATH, **velocity}, **section)
    run = train(student, tmp_path / "student")
    assert run.finished and all(value["loss"] < 1e3 for value in read_losses(tmp_path / "student").values())
    by = run.strategy.task._frozen[0]
    assert isinstance(by, InProcess if teacher else LearnedFlow)
    random = Random(0, torch.arange(50))
    batch, t = Batch(random.normal("x", (2,)), torch.zeros(50).long(), random), torch.linspace(0.1, 0.9, 50)
    x, taught = path_velocity(LogLinear(), batch.of_teacher(by), t, by)
    expected = load_model(home / "teacher").marginal(batch.data, t).state(batch.noise())
    assert torch.equal(x, expected) and not torch.equal(x, LogLinear().state(batch.data, batch.noise(), t))
    assert torch.equal(taught, by.velocity(x, t, batch.condition))


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "semigroup"}, "set objective.path to {name: log_linear, least: 0.01}"),
        (
            {"name": "eulerian", "path": {"name": "trig"}},
            "has a process of its own, and no state of it is seen",
        ),
    ],
)
def test_a_student_along_another_path_is_refused(home, objective, said):
    student = recipe(home, "refused", objective=objective, teacher={"run": str(home / "teacher")})
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_inputs(student)


def test_what_needs_a_path_is_refused(home, tmp_path):
    model = load_model(home / "teacher")
    assert isinstance(model, LearnedFlow)
    random = Random(0, torch.arange(4))
    batch = Batch(torch.zeros(4, 2), torch.zeros(4).long(), random)
    with pytest.raises(ValueError, match="set velocity to teacher or self"):
        path_velocity(LogLinear(), batch.of_teacher(model), torch.full((4,), 0.5), None)
    with pytest.raises(ValueError, match="this teacher has a process of its own"):
        DistributionMatching(path=LogLinear())(model, batch, model)
    for name in ("ddim", "edm", "gamma:gamma=1", "diffusers:DDIMScheduler"):
        with pytest.raises(ValueError, match="has a process of its own; take jump, euler, heun, adaptive"):
            sampler_of(name, path=model.path_of_states, draw=lambda step: torch.zeros(1))
    with pytest.raises(ConfigError, match="distil it into a flow map"):
        export(home / "teacher", tmp_path / "pipeline")


def test_its_bound_is_measured_and_what_has_no_meaning_is_refused(home, tmp_path):
    def measured(**options):
        return likelihood_of_run(
            LikelihoodRequest(home / "teacher", home / "moons", **options), tmp_path / "l.json"
        )

    found = measured(measures=("bound", "ode"), drawn_steps=8, solver="heun:20")
    assert found == json.loads((tmp_path / "l.json").read_text())
    bound = found["bound_bits_per_dim"]
    assert bound["value"] == pytest.approx(sum(bound["terms"].values()))
    assert bound["terms"]["L_N"] == pytest.approx(0, abs=1e-9) and bound["terms"]["L_0"] < 0
    assert bound["evaluations"] == 8 and bound["N"] is None
    assert measured(measures=("bound",))["bound_bits_per_dim"]["evaluations"] == 64
    for options, said in (
        ({"measures": ("iw",)}, "have no importance weights; take bound, or ode"),
        ({"steps": 10}, "--steps: .* no chain of steps"),
        ({"variance": "fixed_large"}, "--variance: .* no chain of steps"),
    ):
        with pytest.raises(ConfigError, match=said):
            measured(**options)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_two_processes_train_what_one_does(home, tmp_path, strategy):
    recipe(home, "pair", objective=OBJECTIVE, training={"steps": 3, "save_every": 3, "log_every": 1})
    one, two = losses_of_one_and_two(home / "pair.yaml", tmp_path, f"strategy.name={strategy}")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)
