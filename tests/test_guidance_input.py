"""A student that takes the scale of guidance as an input is the guided flow map at every scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latents import write_latents
from torch import Tensor

from driftmap.launch.export import check_export, export
from driftmap.models.condition import Scaled, parted, says_nothing, silenced, take
from driftmap.models.denoiser import Guided
from driftmap.models.flow_map import FlowMap
from driftmap.models.samplers import heun, time_grid
from driftmap.trainer.build import build, check_inputs, load_flow_map, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.evaluate import noise_of
from driftmap.trainer.guiding import RandomScale, guided
from driftmap.trainer.objectives.discrete_eulerian import DiscreteEulerian
from driftmap.trainer.objectives.distribution_matching import DistributionMatching
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.tangent import time_derivative
from driftmap.trainer.validation import Sampling
from oracle import GaussianBackbone, exact, gaussian_batch
from runs import checkpoints, driftmap, launched, read_losses, write_config

NULL = 2
RULES: dict[str, Any] = {
    "eulerian": Eulerian(),
    "eulerian, frozen": Eulerian(gradient="semigradient"),
    "lagrangian": Lagrangian(),
    "lagrangian, frozen": Lagrangian(gradient="semigradient"),
    "semigroup": Semigroup(),
}
NETWORKS: dict[str, Any] = {
    "dit": {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 16, "depth": 1, "num_heads": 2},
    "unet": {"name": "unet", "sample_size": 4, "in_channels": 2, "block_out_channels": [8, 16]}
    | {"layers_per_block": 1, "head_width": 8, "norm_num_groups": 4},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


class Told(GaussianBackbone):
    """The exact guided map: with equal spreads the guided velocity is that of the mean m_0 + w (m - m_0)."""

    guidance_input = True

    def forward(
        self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Return the mean velocity (B, 5)."""
        self.scale = scale
        return super().forward(x, s, t, condition)

    def means(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the mean of the guided data of each sample, (B, 1)."""
        nothing = super().means(x, None)
        assert self.scale is not None
        return nothing + self.scale[:, None] * (super().means(x, condition) - nothing)


class Deaf(Told):
    """Takes the scale and does as if it were 2."""

    def means(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the mean of the data at scale 2, (B, 1)."""
        self.scale = torch.full_like(x[:, 0], 2.0)
        return super().means(x, condition)


def scaled_batch(size: int = 256) -> Any:
    batch = gaussian_batch(size, labels=True)
    scale = RandomScale((1.0, 4.0)).sample(batch.random).double()
    return replace(batch, condition=Scaled(batch.condition, scale))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_no_residual_at_the_guided_map_and_one_at_that_of_one_scale(rule: str) -> None:
    teacher = Guided(exact(), 1.0, null_condition=NULL)
    right, deaf = (RULES[rule](FlowMap(backbone), scaled_batch(), teacher) for backbone in (Told(), Deaf()))
    assert max(right[name].max() for name in ("error_jump", "error_diagonal")) < 1e-20
    # By its own jumps a semigroup is one at any scale: there the diagonal tells.
    assert deaf["error_diagonal"].mean() > 1e-3 and (rule == "semigroup" or deaf["error_jump"].mean() > 1e-3)


def test_a_rule_without_a_derivative_tends_to_it() -> None:
    teacher = Guided(exact(), 1.0, null_condition=NULL)
    errors = [
        DiscreteEulerian(fraction=share)(FlowMap(Told()), scaled_batch(), teacher)["error_jump"].mean()
        for share in (0.02, 0.002)
    ]
    assert errors[1] < 0.05 * errors[0]


def test_distribution_matching_leaves_it_alone() -> None:
    teacher = Guided(exact(), 1.0, null_condition=NULL)
    gaps = [
        DistributionMatching()(FlowMap(backbone), scaled_batch(), teacher)["gap_to_teacher"].max()
        for backbone in (Told(), Deaf())
    ]
    assert gaps[0] < 1e-12 and gaps[1] > 0.1


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_its_one_jump_is_the_guided_flow_in_many_steps(scale: float) -> None:
    batch = gaussian_batch(64, labels=True)
    student, teacher = guided(FlowMap(Told()), scale), guided(exact(), scale)
    assert isinstance(student, FlowMap)
    one = torch.ones(64, dtype=torch.float64)
    ends = heun(teacher, batch.noise(), grid=time_grid(300), condition=batch.condition)
    torch.testing.assert_close(
        student.jump(batch.noise(), one, 0 * one, batch.condition), ends, rtol=0, atol=1e-4
    )


def test_a_condition_carries_its_scale_along() -> None:
    scale, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, NULL])
    condition = Scaled(labels, scale)
    taken, dropped = take(condition, labels > 0), silenced(condition, labels == 0, nothing=NULL)
    assert isinstance(taken, Scaled) and taken.scale.tolist() == [2, 3]
    assert isinstance(dropped, Scaled) and parted(dropped, 1)[0].tolist() == [2, 1, 2]  # pyright: ignore
    assert torch.equal(dropped.scale, scale)
    assert says_nothing(condition, NULL).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="takes no scale of guidance"):
        exact().velocity(torch.zeros(3, 5), scale / 4, condition)


def recipe(home: Path, *overrides: str, **sections: Any) -> Any:
    steps = {"training__steps": 4, "training__save_every": 2, "training__log_every": 1}
    config = write_config(home / "config.yaml", home / "latents", data__batch_size=12, **steps, **sections)
    return recipe_from(read_config(config, list(overrides)))


def student_of(home: Path, name: str, *overrides: str, rule: str = "lagrangian") -> Any:
    teacher = {"run": str(home / name), "guidance": {"uniform": [1, 4]}}
    model = {"from_run": str(home / name), "guidance_input": True}
    return recipe(home, *overrides, model=model, teacher=teacher, objective={"name": rule})


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """Return a folder with a short run of each network as a teacher, and a student of it."""
    folder = tmp_path_factory.mktemp("guidance-input")
    write_latents(folder / "latents")
    for name, settings in NETWORKS.items():
        objective = {"name": "flow_matching", "condition_dropout": 0.2}
        train(recipe(folder, model={**settings, "num_classes": 2}, objective=objective), folder / name)
        train(student_of(folder, name), folder / f"{name}-student")
    return folder


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(9, 2, 4, 4),
        torch.linspace(0.05, 0.95, 9),
        torch.linspace(0.9, 0, 9),
        torch.arange(9) % 3,
    )


@every_network
@torch.no_grad()
def test_a_student_starts_as_its_teacher_at_every_scale(home: Path, tmp_path: Path, name: str) -> None:
    made: Any = build(student_of(home, name), tmp_path).model
    student, teacher = made.requires_grad_(False).eval(), load_flow_map(home / name)
    x, s, _, labels = inputs()
    velocity = teacher.velocity(x, s, labels)
    assert student.takes_guidance and velocity.abs().max() > 1e-3
    for scale in (1.0, 3.0):
        assert torch.equal(student.at_guidance(scale).velocity(x, s, labels), velocity)


@every_network
@torch.no_grad()
def test_a_trained_one_sees_the_scale_and_is_the_same_at_1_as_without(home: Path, name: str) -> None:
    student = load_flow_map(home / f"{name}-student")
    x, s, t, labels = inputs()
    plain = student.mean_velocity(x, s, t, labels)
    at_one = student.mean_velocity(x, s, t, Scaled(labels, torch.ones(9)))
    assert torch.equal(at_one, plain) and torch.equal(
        student.at_guidance(1.0).mean_velocity(x, s, t, labels), plain
    )
    assert not torch.equal(student.at_guidance(3.0).mean_velocity(x, s, t, labels), plain)


@every_network
def test_a_derivative_goes_along_at_a_fixed_scale(home: Path, name: str) -> None:
    student = load_flow_map(home / f"{name}-student").double()
    x, s, t, labels = inputs()
    condition = Scaled(labels, torch.linspace(1, 4, 9).double())

    def value(time: Tensor) -> Tensor:
        return student.mean_velocity(x.double(), s.double(), time, condition)

    _, slope = time_derivative(value, t.double(), how="forward")
    step = 1e-5
    difference = (value(t.double() + step) - value(t.double() - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("processes", "rule"), [("fsdp", "lagrangian"), ("zero3", "semigroup")])
def test_two_processes_are_one(home: Path, processes: str, rule: str) -> None:
    alone, two = home / f"alone-{processes}", home / processes
    student_of(home, "dit", rule=rule)  # writes the config
    words = ("train", home / "config.yaml")
    driftmap(*words, "--out", alone, logs=home / "alone.logs").succeeded()
    both = launched(2, *words, f"strategy.name={processes}", "--out", two, logs=two)
    assert all(command.succeeded() for command in both)
    for step, losses in read_losses(alone).items():
        assert abs(read_losses(two)[step]["loss"] - losses["loss"]) < 1e-5


def test_a_run_resumes_exactly(home: Path) -> None:
    whole, halves = home / "whole", home / "halves"
    student_of(home, "dit")
    words = ("train", home / "config.yaml")
    for out, more in ((whole, ()), (halves, ("training.steps=2",)), (halves, ())):
        driftmap(*words, *more, "--out", out, logs=home / "resumed.logs").succeeded()
    assert checkpoints(halves)["step-00000004"] == checkpoints(whole)["step-00000004"]


@every_network
def test_the_published_pipeline_takes_the_scale(home: Path, tmp_path: Path, name: str) -> None:
    from diffusers import DiffusionPipeline

    run = home / f"{name}-student"
    for out, of in ((tmp_path / "student", run), (tmp_path / "teacher", home / name)):
        export(of, out)
    assert check_export(tmp_path / "student", run) < 1e-5
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 2, 4, 4)

    def made(**scale: float) -> Tensor:
        return pipe(class_labels=[0, 1], latents=noise, output_type="latent", **scale).images

    assert torch.equal(made(), made(guidance_scale=1.0)) and not torch.equal(made(), made(guidance_scale=3.0))
    with pytest.raises(ValueError, match=r"guidance_scale is 0\.5, expected 1"):
        made(guidance_scale=0.5)
    other: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher", trust_remote_code=True)
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        other(class_labels=[0, 1], latents=noise, guidance_scale=2.0)


def test_sampling_takes_it_in_jumps_and_other_networks_refuse(home: Path) -> None:
    from driftmap.launch.sampling import SamplingRequest, _samples

    run, labels = home / "dit-student", torch.arange(4) % 2
    model = load_flow_map(run)
    one, three = (
        _samples(SamplingRequest(run, nfe=1, count=4, guidance=scale), model, labels)[0]
        for scale in (1.0, 3.0)
    )
    noise = torch.zeros_like(one)
    assert one.shape == noise.shape and not torch.equal(one, three)
    with pytest.raises(ConfigError, match=r"guidance 0\.5: this network takes the scale as an input, from 1"):
        _samples(SamplingRequest(run, nfe=1, count=4, guidance=0.5), model, labels)
    plain = home / "dit"
    with pytest.raises(ConfigError, match="a jump cannot be guided"):
        request = SamplingRequest(plain, nfe=1, count=4, guidance=3.0, sampler="jump")
        _samples(request, load_flow_map(plain), labels)


def test_evaluation_has_one_scale_for_student_and_teacher_and_not_those_of_the_training(home: Path) -> None:
    from driftmap.launch.evaluation import EvaluationRequest, _at_guidance

    student, batch = load_flow_map(home / "dit-student"), scaled_batch(4)
    taught = {"uniform": [1, 4]}
    request = EvaluationRequest(home / "dit-student", "features", home / "pictures", guidance=3.0)
    found, guidance = _at_guidance(student, request, taught)
    assert (found.scale, guidance) == (3.0, 3.0)
    assert _at_guidance(student, replace(request, guidance=None), taught)[1] == 1.0
    with pytest.raises(ConfigError, match="--guidance 3: .* takes no scale of guidance"):
        _at_guidance(load_flow_map(home / "dit"), request, 1.0)
    samples = Sampling("jump", 1, 3.0)(student, batch)["samples"]
    noise, one = noise_of(batch.random.index, student.sample_shape, seed=0), torch.ones(4)
    assert torch.equal(samples, found.jump(noise, one, 0 * one, batch.condition.condition))


def test_what_does_not_fit_is_refused(home: Path) -> None:
    run = str(home / "dit")
    taught = {"run": run, "guidance": {"uniform": [1, 4]}}
    rule = {"name": "semigroup"}
    with pytest.raises(
        ConfigError, match=r"^teacher\.guidance: a scale that is drawn .* model\.guidance_input"
    ):
        check_inputs(recipe(home, model={"from_run": run}, teacher=taught, objective=rule))
    told = {"from_run": run, "guidance_input": True}
    with pytest.raises(ConfigError, match=r"^model\.guidance_input: .* none is drawn; set teacher\.guidance"):
        check_inputs(recipe(home, model=told, teacher={"run": run, "guidance": 2.0}, objective=rule))
    with pytest.raises(ConfigError, match=r"expected two scales that rise, such as \[1, 4\]"):
        recipe(home, model=told, teacher={"run": run, "guidance": {"uniform": [4, 1]}}, objective=rule)
    with pytest.raises(ConfigError, match="takes the whole model from a run; remove width"):
        recipe(home, model={"from_run": run, "width": 8}, teacher=taught, objective=rule)
