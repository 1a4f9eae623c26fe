"""A path's conversions are one mathematics: derivatives are derivatives, and every way back leads back."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from torch import Tensor

from driftmap.models.denoiser import Denoiser, Guided
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.models.samplers import time_grid
from driftmap.trainer.objectives.flow_matching import FlowMatching
from oracle import CLASS_MEANS, GaussianBackbone, Posterior, exact, gaussian_batch

PATHS = {"linear": Linear(), "trig": Trig()}
every_path = pytest.mark.parametrize("name", PATHS)
every_prediction = pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "v"])
TIMES = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
BATCH = gaussian_batch(64)
DATA, NOISE = BATCH.data, BATCH.noise()


@every_path
def test_the_coefficients_derivatives_are_those_of_autograd(name: str) -> None:
    path, t = PATHS[name], torch.linspace(0, 1, 64, dtype=torch.float64, requires_grad=True)
    for coefficient, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (expected,) = torch.autograd.grad(coefficient(t).sum(), t)
        torch.testing.assert_close(derivative(t), expected)


@every_path
def test_a_path_leads_from_data_to_noise(name: str) -> None:
    path, zero, one = PATHS[name], torch.zeros(64).double(), torch.ones(64).double()
    torch.testing.assert_close(path.state(DATA, NOISE, zero), DATA)
    torch.testing.assert_close(path.state(DATA, NOISE, one), NOISE)


def test_the_paths_are_the_straight_line_and_the_quarter_circle() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    data, noise = torch.tensor([[3.0]]).double(), torch.tensor([[6.0]]).double()
    assert Linear().state(data, noise, third).item() == pytest.approx(4.0)
    assert Trig().state(data, noise, third).item() == pytest.approx(3 * math.sqrt(3) / 2 + 3)


@every_prediction
@every_path
def test_end_points_are_found_again_from_the_state_and_any_prediction(name: str, prediction: Any) -> None:
    path = PATHS[name]
    state, velocity = path.state(DATA, NOISE, TIMES), path.velocity(DATA, NOISE, TIMES)
    v = (path.alpha(TIMES)[:, None] * NOISE - path.sigma(TIMES)[:, None] * DATA) / path.scale(TIMES)[:, None]
    said = {"velocity": velocity, "noise": NOISE, "data": DATA, "v": v}[prediction]
    data, noise = path.end_points(state, said, TIMES, kind=prediction)
    torch.testing.assert_close(data, DATA)
    torch.testing.assert_close(noise, NOISE)


@every_path
def test_a_velocity_prediction_gives_the_end_points_at_both_ends_of_time(name: str) -> None:
    path, ends = PATHS[name], torch.tensor([0.0, 1.0] * 32).double()
    state, velocity = path.state(DATA, NOISE, ends), path.velocity(DATA, NOISE, ends)
    data, noise = path.end_points(state, velocity, ends, kind="velocity")
    torch.testing.assert_close(data, DATA)
    torch.testing.assert_close(noise, NOISE)


@every_prediction
@every_path
def test_a_denoiser_has_the_same_velocity_whatever_its_network_predicts(name: Any, prediction: Any) -> None:
    path = PATHS[name]
    denoiser = Denoiser(Posterior(path, prediction), path, prediction=prediction)
    x = path.state(DATA, NOISE, TIMES)
    torch.testing.assert_close(denoiser.velocity(x, TIMES), exact(path=name).velocity(x, TIMES))


class Offset(GaussianBackbone):
    """The exact velocity plus c."""

    def __init__(self, c: float, std: float) -> None:
        super().__init__(std=std)
        self.c = c

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t, condition) + self.c


@pytest.mark.parametrize("std", [0.0, 0.4, 2.0])
def test_adding_c_to_the_exact_velocity_raises_the_flow_matching_loss_by_c_squared(std: float) -> None:
    """The cross term 2 c E[v - target] is of either sign, so that it leaves the mean of +c and -c."""
    batch = gaussian_batch(64, std=std)
    plus, none, minus = (FlowMatching()(FlowMap(Offset(c, std)), batch)["loss"] for c in (0.3, 0.0, -0.3))
    assert ((plus + minus) / 2 - none).item() == pytest.approx(0.3**2, rel=1e-12)
    assert std or plus.item() == pytest.approx(0.3**2, rel=1e-12)
    many = gaussian_batch(20_000, std=std)
    raised = (
        FlowMatching()(FlowMap(Offset(0.3, std)), many)["loss"] - FlowMatching()(exact(std=std), many)["loss"]
    )
    # The target's spread given x is at most sqrt(1 + std^2), over 20 000 times 5 numbers.
    assert abs(raised.item() - 0.3**2) < 4 * 2 * 0.3 * math.sqrt((1 + std**2) / 1e5)


LABELS = torch.tensor([0, 1] * 32)
NULL = len(CLASS_MEANS)


def test_guidance_of_scale_one_is_the_conditional_velocity() -> None:
    guided = Guided(exact(), 1.0, null_condition=NULL)
    torch.testing.assert_close(
        guided.velocity(DATA, TIMES, LABELS), exact().velocity(DATA, TIMES, LABELS), rtol=1e-14, atol=1e-14
    )


def test_guidance_goes_on_from_the_velocity_without_class_in_its_interval_only() -> None:
    guided = Guided(exact(), 3.0, null_condition=NULL, interval=(0.25, 0.75))
    conditional = exact().velocity(DATA, TIMES, LABELS)
    unconditional = exact().velocity(DATA, TIMES, torch.full_like(LABELS, NULL))
    inside = ((TIMES >= 0.25) & (TIMES <= 0.75))[:, None]
    expected = torch.where(inside, unconditional + 3 * (conditional - unconditional), conditional)
    torch.testing.assert_close(guided.velocity(DATA, TIMES, LABELS), expected)
    assert 0 < inside.sum() < 64
    assert Guided.evaluations == 2


def test_guidance_is_on_from_noise_to_data_unless_an_interval_is_asked_for() -> None:
    for t in (0.0, 0.5, 1.0):
        guided = Guided(exact(), 3.0, null_condition=NULL)
        times = torch.full_like(TIMES, t)
        conditional = exact().velocity(DATA, times, LABELS)
        unconditional = exact().velocity(DATA, times, torch.full_like(LABELS, NULL))
        torch.testing.assert_close(
            guided.velocity(DATA, times, LABELS), unconditional + 3 * (conditional - unconditional)
        )


def test_the_interval_of_guidance_includes_its_ends() -> None:
    guided = Guided(exact(), 3.0, null_condition=NULL, interval=(0.25, 0.75))
    for t in (0.25, 0.75):
        times = torch.full_like(TIMES, t)
        assert not torch.allclose(guided.velocity(DATA, times, LABELS), exact().velocity(DATA, times, LABELS))


def test_guidance_without_a_class_is_refused() -> None:
    with pytest.raises(
        ValueError, match="guidance needs a condition: give class labels, or set guidance to 1"
    ):
        Guided(exact(), 2.0, null_condition=NULL).velocity(DATA, TIMES)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 50])
def test_the_time_grid_is_that_of_the_published_scheduler(num_steps: int, shift: float) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(time_grid(num_steps, shift=shift), scheduler.sigmas)


def test_a_time_grid_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0, expected at least 1"):
        time_grid(0)
