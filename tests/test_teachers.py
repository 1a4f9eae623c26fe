"""A run of any prediction is a velocity on [0, 1] that teaches, and that a student may start from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.data.synthetic import write_points
from driftmap.models.denoiser import Along, Denoiser, Guided, InBf16
from driftmap.models.flow_map import FlowMap
from driftmap.models.guidance import Autoguided, Rescaled
from driftmap.models.path import Linear, Trig, expand
from driftmap.models.samplers import ddim, jump, time_grid
from driftmap.models.schedule import Cosine, ScaledLinearBetas
from driftmap.trainer import cost
from driftmap.trainer.build import build, check_inputs, load_flow_map, load_model, train
from driftmap.trainer.checkpoint import fingerprint
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.tangent import time_derivative
from driftmap.trainer.times import Pairs
from oracle import CLASS_MEANS, PATHS, Posterior, carried, exact, gaussian_batch
from runs import write_config

every_path = pytest.mark.parametrize("name", PATHS)
every_kind = pytest.mark.parametrize("kind", ["noise", "data", "v", "velocity"])
BATCH = gaussian_batch(64)
TIMES = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)


def denoiser(path: Any, kind: Any = "v", **settings: Any) -> Denoiser:
    return Denoiser(
        Posterior(path, kind, **settings), path, prediction=kind, data_std=settings.get("data_std", 1)
    )


def exact_velocity(path: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return the derivative of the closed form of the flow, by autograd."""
    time = t.clone().requires_grad_()
    ends = torch.stack([carried(x[i], path, t[i], time[i]) for i in range(len(x))])
    slopes = [torch.autograd.grad(ends[:, j].sum(), time, retain_graph=True)[0] for j in range(x.shape[1])]
    return torch.stack(slopes, dim=1)


@pytest.mark.parametrize("data_std", [1.0, 0.5])
@every_kind
@every_path
def test_each_prediction_gives_the_exact_velocity(name: str, kind: Any, data_std: float) -> None:
    path = PATHS[name]
    x = path.state(BATCH.data, BATCH.noise(), TIMES)
    found = denoiser(path, kind, data_std=data_std).velocity(x, TIMES)
    torch.testing.assert_close(found, exact_velocity(path, x, TIMES), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["data", "v", "velocity"])
@every_path
def test_the_velocity_is_finite_at_both_ends(name: str, kind: Any) -> None:
    path, ends = PATHS[name], torch.tensor([0.0, 1.0] * 32).double()
    x = path.state(BATCH.data, BATCH.noise(), ends)
    found = denoiser(path, kind).velocity(x, ends)
    inside = ends + 1e-7 * (1 - 2 * ends)
    near = denoiser(path, kind).velocity(path.state(BATCH.data, BATCH.noise(), inside), inside)
    torch.testing.assert_close(found, near, rtol=1e-3, atol=1e-3)


@every_path
def test_a_jump_is_a_step_of_ddim_and_ends_where_it_starts_if_there_is_no_gap(name: str) -> None:
    path, model, noise = PATHS[name], denoiser(PATHS[name]), BATCH.noise()
    grid = time_grid(5)
    torch.testing.assert_close(jump(model, noise, grid=grid), ddim(model, noise, grid=grid, path=path))
    torch.testing.assert_close(model.jump(noise, TIMES, TIMES), noise)
    for gap in (1e-5, -1e-5, 1e-7):
        near = model.mean_velocity(noise, TIMES, TIMES + gap)
        torch.testing.assert_close(near, model.velocity(noise, TIMES), rtol=1e-2, atol=1e-3)


@every_path
def test_the_derivative_in_the_target_is_that_of_a_difference(name: str) -> None:
    """The Lagrangian rule differentiates a denoiser's jumps in forward mode."""
    model, x, target = (
        denoiser(PATHS[name]),
        BATCH.noise(),
        0.7 * TIMES + 3.3e-4,
    )  # between the steps of a chain
    of = lambda time: model.mean_velocity(x, TIMES, time)  # noqa: E731
    values, slopes = time_derivative(of, target, how="forward")
    expected, differences = time_derivative(of, target, how="finite_difference")
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slopes, differences, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["quarter circle", "cosine", "zero terminal"])
@pytest.mark.parametrize("rule", [FlowMatching, Semigroup, Lagrangian])
def test_a_denoiser_learns_by_every_rule(rule: Any, name: str) -> None:
    """On the diagonal it agrees with the exact velocity; its jumps, DDIM's, do not with the exact map."""
    path = PATHS[name]
    settings = {} if rule is FlowMatching else {"pairs": Pairs(diagonal=0.5)}
    losses = rule(path=path, **settings)(denoiser(path), gaussian_batch(), denoiser(path))
    diagonal = losses["error"] if rule is FlowMatching else losses["error_diagonal"]
    assert diagonal.max() < 1e-20
    assert rule is FlowMatching or losses["error_jump"].mean() > 1e-4


@pytest.mark.parametrize("to", PATHS)
@every_path
def test_a_velocity_along_another_path_is_that_paths_own(name: str, to: str) -> None:
    """Where the first path has no such noise, the mean of the data stays: the error is small there."""
    own, path = PATHS[name], PATHS[to]
    x = path.state(BATCH.data, BATCH.noise(), TIMES)
    found = Along(denoiser(own), own, path).velocity(x, TIMES)
    expected = denoiser(path).velocity(x, TIMES)
    known = path.angle(TIMES) <= own.angle(torch.ones(1).double())
    assert known.sum() > 60
    torch.testing.assert_close(found[known], expected[known], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_beyond_the_noise_of_a_chain_the_end_is_reached_all_the_same() -> None:
    """Stable Diffusion's schedule has 0.938 of the line: from pure noise on, its flow arrives at the data."""
    own, noise = ScaledLinearBetas(), BATCH.noise()
    found = ddim(Along(denoiser(own), own, Linear()), noise, grid=time_grid(200), path=Linear())
    torch.testing.assert_close(found, 0.7 + 0.4 * noise, rtol=0, atol=0.05)
    ends = torch.tensor([0.0, 1.0] * 32).double()
    assert Along(denoiser(own), own, Linear()).velocity(noise, ends).isfinite().all()


def test_a_velocity_along_another_path_costs_what_it_costs() -> None:
    guided = Guided(exact(), 2.0, null_condition=2)
    assert Along(guided, Linear(), Trig()).evaluations == 2
    assert Along(exact(), Linear(), Trig()).evaluations == 1
    labels = torch.tensor([0, 1] * 32)
    x = Trig().state(BATCH.data, BATCH.noise(), TIMES)
    torch.testing.assert_close(
        Along(guided, Linear(), Trig()).velocity(x, TIMES, labels),
        Guided(exact(path="trig"), 2.0, null_condition=2).velocity(x, TIMES, labels),
    )


def test_rescaled_guidance_has_the_spread_of_the_conditional_velocity() -> None:
    labels, null = torch.tensor([0, 1] * 32), len(CLASS_MEANS)
    guided = Guided(exact(), 5.0, null_condition=null, interval=(0.2, 0.9))
    x = Linear().state(BATCH.data, BATCH.noise(), TIMES)
    b_c, b_g = exact().velocity(x, TIMES, labels), guided.velocity(x, TIMES, labels)
    whole = Rescaled(guided, 1.0).velocity(x, TIMES, labels)
    torch.testing.assert_close(whole.std(1), b_c.std(1))
    torch.testing.assert_close(whole / b_g, (whole / b_g)[:, :1].expand_as(b_g))
    half = Rescaled(guided, 0.5).velocity(x, TIMES, labels)
    torch.testing.assert_close(half, (whole + b_g) / 2)
    assert torch.equal(Rescaled(guided, 0.0).velocity(x, TIMES, labels), b_g)
    assert Rescaled.evaluations == 2


def test_autoguidance_goes_away_from_the_weak_velocity_in_its_interval_only() -> None:
    strong, weak = exact(), exact(std=0.9)
    x = Linear().state(BATCH.data, BATCH.noise(), TIMES)
    b, b_weak = strong.velocity(x, TIMES), weak.velocity(x, TIMES)
    found = Autoguided(strong, weak, 2.0, interval=(0.3, 0.6)).velocity(x, TIMES)
    inside = expand((TIMES >= 0.3) & (TIMES <= 0.6), x)
    torch.testing.assert_close(found, torch.where(inside, 2 * b - b_weak, b))
    assert Autoguided(strong, weak, 2.0).evaluations == 2
    assert Autoguided(Guided(strong, 2.0, null_condition=2), weak, 2.0).evaluations == 3


DENOISERS: dict[str, dict[str, Any]] = {
    "ddpm": {"name": "ddpm"},
    "cosine-v": {"name": "ddpm", "path": {"name": "cosine"}, "prediction": "v"},
    "edm": {
        "name": "ddpm",
        "path": {"name": "linear"},
        "prediction": "v",
        "data_std": 0.7,
        "times": {"name": "logit_normal", "mean": -1.2, "std": 1.2},
    },
    "data": {
        "name": "ddpm",
        "path": {"name": "cosine"},
        "prediction": "data",
        "weighting": {"name": "min_snr"},
    },
    "flow": {"name": "flow_matching", "path": {"name": "trig"}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """Return a folder of points and of short runs, one a prediction."""
    folder = tmp_path_factory.mktemp("teachers")
    write_points(folder / "moons", "moons", n=500, seed=0)
    for name, objective in DENOISERS.items():
        run(folder, name, objective=objective)
    return folder


def recipe(home: Path, name: str, **changes: Any) -> Any:
    config = write_config(home / f"{name}.yaml", home / "moons", **{"training__log_every": 6, **changes})
    return recipe_from(read_config(config))


def run(home: Path, name: str, **changes: Any) -> Path:
    train(recipe(home, name, **changes), home / name)
    return home / name


@pytest.mark.parametrize("name", DENOISERS)
def test_a_run_is_read_as_what_it_was_trained_to_be(home: Path, name: str) -> None:
    model, objective = load_model(home / name), DENOISERS[name]
    assert isinstance(model, FlowMap)
    assert model.path.name == objective.get("path", {"name": "linear_betas"})["name"]
    assert getattr(model, "prediction", None) == (
        None if name == "flow" else objective.get("prediction", "noise")
    )
    assert getattr(model, "data_std", 1) == objective.get("data_std", 1)
    assert model.velocity(torch.zeros(3, 2), torch.full((3,), 0.5)).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_run_of_any_prediction_teaches_along_the_students_path(
    home: Path, tmp_path: Path, name: str, precision: str
) -> None:
    """What the student is taught is the run's velocity at the same noise level, whatever the path."""
    teacher = {"run": str(home / name), "precision": precision}
    made = build(recipe(home, "student", teacher=teacher, objective={"name": "semigroup"}), tmp_path)
    (taught_by,) = made.strategy.task._frozen
    assert isinstance(taught_by, Along) == (name != "edm")
    inner = taught_by.inner if isinstance(taught_by, Along) else taught_by
    t, noise = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05, torch.randn(200, 2)
    x = Linear().state(torch.randn(200, 2), noise, t)
    model = load_model(home / name)
    expected = Along(model, model.path, Linear()).velocity(x, t)
    rms = expected.square().mean().sqrt()
    error = (taught_by.velocity(x, t) - expected).square().mean().sqrt() / rms
    assert error < (1e-6 if precision == "fp32" else 0.05)
    assert isinstance(inner, InBf16) == (precision == "bf16")


def test_a_teacher_on_the_students_path_is_taken_as_it_is(home: Path, tmp_path: Path) -> None:
    section = {"run": str(home / "cosine-v")}
    objective = {"name": "semigroup", "path": {"name": "cosine"}}
    made = build(recipe(home, "same", teacher=section, objective=objective), tmp_path)
    assert isinstance(made.strategy.task._frozen[0], Denoiser)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weak_run_guides_a_teacher(home: Path, tmp_path: Path, precision: str) -> None:
    section = {"run": home / "cosine-v", "weak": home / "data", "guidance": 2.0, "precision": precision}
    section = {key: str(value) if isinstance(value, Path) else value for key, value in section.items()}
    objective = {"name": "semigroup", "path": {"name": "cosine"}}
    made = build(recipe(home, "guided", teacher=section, objective=objective), tmp_path)
    strong, weak = load_flow_map(home / "cosine-v"), load_flow_map(home / "data")
    x, t = torch.randn(100, 2), torch.linspace(0.1, 0.9, 100)
    expected = 2 * strong.velocity(x, t) - weak.velocity(x, t)
    error = made.strategy.task._frozen[0].velocity(x, t) - expected
    assert error.square().mean() / expected.square().mean() < (1e-12 if precision == "fp32" else 0.05**2)
    # A run goes on only with the same two networks.
    assert made.lineage["teacher"] == f"{fingerprint(strong)}+{fingerprint(weak)}"


@pytest.mark.parametrize(
    ("weak", "guidance", "message"),
    [
        ("data", 1.0, r"^teacher: guidance 1 is none: .* autoguidance have no effect"),
        ("edm", 2.0, r"^teacher: autoguidance takes .* a weak run of the run's own path"),
    ],
)
def test_a_weak_run_that_cannot_guide_is_refused(
    home: Path, weak: str, guidance: float, message: str
) -> None:
    section = {"run": str(home / "cosine-v"), "weak": str(home / weak), "guidance": guidance}
    with pytest.raises(ConfigError, match=message):
        check_inputs(recipe(home, "refused", teacher=section, objective={"name": "semigroup"}))


def test_both_networks_of_an_autoguided_teacher_are_counted(home: Path) -> None:
    section = {"run": str(home / "cosine-v"), "guidance": 2.0}
    plain, guided = (
        recipe(home, "counted", teacher=section | more, objective={"name": "flow_matching"})
        for more in ({"guidance": 1.0}, {"weak": str(home / "data")})
    )
    frozen = [cost.held(each, cost.network_of(each.model), 1).frozen for each in (plain, guided)]
    assert frozen[1] == 2 * frozen[0] > 0
    calls = [sum(cost.evaluations(each).values()) for each in (plain, guided)]
    assert calls == [2, 3]
    forward = 2 * (34 * 16 + 2 * 16 * 16 + 16 * 2)  # of a perceptron
    assert cost.flops(guided) - cost.flops(plain) == forward


@pytest.mark.parametrize("rule", ["semigroup", "lagrangian"])
def test_a_student_starts_as_its_teacher_and_keeps_what_its_network_says(
    home: Path, tmp_path: Path, rule: str
) -> None:
    section = {"model": {"from_run": str(home / "edm")}, "teacher": {"run": str(home / "edm")}}
    out = run(home, f"from-edm-{rule}", objective={"name": rule}, **section)
    means = json.loads((out / "network.json").read_text())["means"]
    assert means == {"prediction": "v", "path": {"name": "linear"}, "data_std": 0.7, "variance": "fixed"}
    student = load_model(out)
    assert isinstance(student, Denoiser) and student.prediction == "v" and student.data_std == 0.7
    started = build(recipe(home, "start", objective={"name": rule}, **section), tmp_path).model
    assert isinstance(started, Denoiser)
    x, t = torch.randn(8, 2), torch.rand(8)
    teacher = load_model(home / "edm")
    assert isinstance(teacher, Denoiser)
    torch.testing.assert_close(started.velocity(x, t), teacher.velocity(x, t))


@pytest.mark.parametrize(
    "source, objective, message",
    [
        ("cosine-v", {"name": "semigroup"}, "set objective.path to {name: cosine, num_steps: 1000"),
        ("flow", {"name": "ddpm"}, "was trained for prediction velocity, not noise; set it to velocity"),
        ("edm", DENOISERS["cosine-v"], "objective.data_std: the network of"),
        ("ddpm", DENOISERS["cosine-v"], "was trained for prediction noise, not v; set it to noise"),
    ],
)
def test_an_output_is_not_taken_for_something_else(
    home: Path, tmp_path: Path, source: str, objective: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(
            recipe(home, "refused", model={"from_run": str(home / source)}, objective=objective),
            home / "none",
        )
    assert message in str(refused.value)


def test_a_network_goes_on_along_another_schedule(home: Path) -> None:
    """As Lin et al. do: the same prediction, rescaled to zero terminal signal."""
    path = {"name": "cosine", "zero_terminal_snr": True}
    objective = {**DENOISERS["cosine-v"], "path": path}
    out = run(home, "rescaled", model={"from_run": str(home / "cosine-v")}, objective=objective)
    model = load_model(out)
    assert isinstance(model, Denoiser) and model.path == Cosine(zero_terminal_snr=True)
