"""A learned forward process keeps its ends, has right derivatives, and its bound is tight where it can be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.backbones.mlp import MLP
from driftmap.models.denoiser import Denoiser
from driftmap.models.log_variance import LogVariance
from driftmap.models.neural_flow import LearnedFlow, Transform, polynomials
from driftmap.models.path import LogLinear
from driftmap.models.samplers import heun, jump, time_grid
from driftmap.trainer.continuous_bound import ContinuousBound
from driftmap.trainer.objective import Batch, mean_square
from driftmap.trainer.objectives.ddpm import Ddpm
from driftmap.trainer.objectives.neural_flow import NeuralFlow, times
from driftmap.trainer.seeds import Random
from driftmap.trainer.weighting import Bound
from oracle import Posterior, carried, gaussian_batch

PATH = LogLinear()
TIMES = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)
BATCH = gaussian_batch(64)


def learned(shape: tuple[int, ...] = (5,), *, volatility: bool = True, seed: int = 0) -> LearnedFlow:
    """Return a model whose every weight is some number."""
    torch.manual_seed(seed)
    backbone = MLP(channels=math.prod(shape), width=16, depth=1)
    backbone.sample_shape = shape
    transform = Transform(shape, order=3, width=12, depth=2)
    model = LearnedFlow(
        backbone, PATH, transform=transform, volatility=LogVariance() if volatility else None
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_the_process_has_fixed_ends_and_is_inverted(shape: tuple[int, ...]) -> None:
    model, random = learned(shape), Random(0, torch.arange(64))
    data, noise = (random.normal(name, shape).double() for name in ("data", "noise"))
    start, end = (model.marginal(data, torch.full((64,), t).double()) for t in (0.0, 1.0))
    assert torch.equal(start.mean, data) and torch.equal(end.mean, torch.zeros_like(data))
    torch.testing.assert_close(start.std, torch.full_like(data, 0.01), rtol=1e-14, atol=0)
    assert torch.equal(end.std, torch.ones_like(data))
    assert model.prior_term(data).abs().max() < 1e-12
    inside = model.marginal(data, TIMES)
    assert (inside.mean - PATH.alpha(TIMES).reshape(-1, *[1] * len(shape)) * data).abs().mean() > 0.01
    torch.testing.assert_close(inside.noise(inside.state(noise)), noise)


def test_derivatives_in_time_are_those_of_autograd() -> None:
    model = learned()
    noise, time = BATCH.noise(), TIMES.clone().requires_grad_()
    marginal = model.marginal(BATCH.data, time)
    state = marginal.state(noise)
    for column in range(5):
        (slope,) = torch.autograd.grad(state[:, column].sum(), time, retain_graph=True)
        torch.testing.assert_close(marginal.velocity(noise)[:, column], slope)


def test_polynomials_vanish_at_both_ends_and_are_independent() -> None:
    values, _ = polynomials(torch.tensor([0.0, 1.0]), 4)
    assert torch.equal(values, torch.zeros(2, 4))
    assert torch.linalg.matrix_rank(polynomials(TIMES, 4)[0]) == 4


@pytest.mark.parametrize("transform", [None, Transform((5,), order=3, width=8, depth=1)])
def test_without_a_transform_it_is_a_variational_diffusion_model(transform: Transform | None) -> None:
    """The integrand is the one that the objective ddpm has with the bound's weights, sample by sample."""
    torch.manual_seed(0)
    backbone = MLP(channels=5, width=16, depth=1).double()
    model = LearnedFlow(backbone, PATH, transform=transform, least_volatility=1e-9, data_std=0.7).double()
    ddpm = Ddpm(path=PATH, prediction="v", data_std=0.7, weighting=Bound("bound"))
    denoiser, noise = Denoiser(backbone, PATH, prediction="v", data_std=0.7), BATCH.noise()
    target = PATH.target(BATCH.data, noise, TIMES, kind="v", data_std=0.7)
    said = denoiser.predict(PATH.state(BATCH.data, noise, TIMES), TIMES, TIMES)
    expected = 5 * ddpm.weight(TIMES) * mean_square(said - target)
    found, _ = model.path_term(BATCH.data, noise, TIMES)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    x = PATH.state(BATCH.data, noise, TIMES)
    torch.testing.assert_close(model.velocity(x, TIMES), denoiser.velocity(x, TIMES))


def exact_model(**settings: Any) -> LearnedFlow:
    return LearnedFlow(Posterior(PATH, "v"), PATH, **settings)


def test_the_bound_of_gaussian_data_is_their_entropy() -> None:
    """With the exact mean of the data; a volatility that is not the path's loses nats."""
    data = 0.7 + 0.4 * Random(1, torch.arange(80_000)).normal("data", (2,)).double()
    batch = Batch(data, None, Random(0, torch.arange(len(data))))
    exactly = (((data - 0.7) / 0.4).square() / 2 + math.log(0.4 * math.sqrt(2 * math.pi))).sum(1)
    gap = ContinuousBound(exact_model(), 16)(batch).nats - exactly
    error = gap.std() / len(gap) ** 0.5
    assert error < 0.01 and abs(gap.mean()) < 0.03, (gap.mean(), error)
    loose = LogVariance().double()
    torch.nn.init.constant_(loose.outputs.bias, math.log(4))
    wrong = exact_model(volatility=loose)
    assert ContinuousBound(wrong, 16)(batch).nats.mean() > exactly.mean() + 1
    loss = NeuralFlow()(exact_model(), Batch(data, None, batch.random, 80_000))
    assert 2 * loss["bound"].item() == pytest.approx(exactly.mean().item(), abs=0.05)


def test_every_learned_part_has_the_gradient_of_a_finite_difference() -> None:
    model, objective = learned(), NeuralFlow(volatility="learned")
    loss = lambda: objective(model, BATCH)["loss"]  # noqa: E731
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    assert {name.split(".")[0] for name in parameters} == {"backbone", "transform", "volatility"}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = gradient / gradient.norm()
        with torch.no_grad():
            ends = []
            for step in (1e-5, -2e-5):
                parameter += step * direction
                ends.append(loss().item())
            parameter += 1e-5 * direction
        assert gradient.norm() > 1e-9, name
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(gradient.norm().item(), rel=1e-4), name


def test_the_flow_of_exact_predictions_is_the_exact_flow() -> None:
    noise, grid = BATCH.noise(), time_grid(400)
    expected = carried(noise, PATH, torch.tensor(1.0).double(), torch.tensor(0.0).double())
    torch.testing.assert_close(heun(exact_model(), noise, grid=grid), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(jump(exact_model(), noise, grid=grid), expected, rtol=0, atol=2e-2)


def test_a_jump_is_a_step_along_the_process_of_the_data_predicted() -> None:
    model, x = learned(), BATCH.noise()
    targets = 0.5 * TIMES
    data = model.data_mean(x, TIMES)
    noise = model.marginal(data, TIMES).noise(x)
    torch.testing.assert_close(model.jump(x, TIMES, targets), model.marginal(data, targets).state(noise))
    torch.testing.assert_close(model.mean_velocity(x, TIMES, TIMES), model.velocity(x, TIMES))
    near = model.mean_velocity(x, TIMES, TIMES - 2e-4)
    torch.testing.assert_close(near, model.velocity(x, TIMES), rtol=1e-2, atol=1e-2)


def test_the_times_of_a_step_are_even_on_any_number_of_processes() -> None:
    def drawn(index: Tensor) -> Tensor:
        return times(Batch(torch.zeros(len(index), 2), None, Random(3, index), 8))

    index = torch.arange(24)
    whole = drawn(index)
    assert torch.equal(whole[1::2], drawn(index[1::2]))
    for step in whole.reshape(3, 8):
        torch.testing.assert_close(step.sort().values.diff(), torch.full((7,), 1 / 8).double())
    assert len(whole.unique()) == 24 and 0 < whole.min() and whole.max() < 1


def test_half_precision_around_it_changes_no_derivative() -> None:
    model = learned().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.marginal(BATCH.data.float(), TIMES.float())
    for found, expected in zip(half, model.marginal(BATCH.data.float(), TIMES.float()), strict=True):
        assert torch.equal(found, expected) and found.dtype == torch.float32
