"""A DDPM schedule is N noise levels as published and a smooth path on [0, 1] through them."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from driftmap.models.path import Linear, Path, Trig, shifted
from driftmap.models.samplers import noise_grid, time_grid
from driftmap.models.schedule import Cosine, Discrete, LinearBetas, ScaledLinearBetas
from oracle import gaussian_batch

SCHEDULES: dict[str, Discrete] = {
    "linear": LinearBetas(),
    "scaled linear": ScaledLinearBetas(),
    "cosine": Cosine(),
    "zero terminal": ScaledLinearBetas(zero_terminal_snr=True),
    "few steps": Cosine(num_steps=40),
    "other betas": LinearBetas(num_steps=250, first=2e-4, last=0.01),
}
THEIRS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PATHS: dict[str, Path] = {"the line": Linear(), "the quarter circle": Trig(), **SCHEDULES}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_path = pytest.mark.parametrize("name", PATHS)
TIMES = torch.linspace(0, 1, 2001, dtype=torch.float64)


@pytest.mark.parametrize("name", THEIRS)
def test_the_noise_levels_are_those_of_diffusers(name: str) -> None:
    theirs = diffusers.DDPMScheduler(**THEIRS[name])
    torch.testing.assert_close(SCHEDULES[name].alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(SCHEDULES[name].betas.float(), theirs.betas, rtol=1e-5, atol=1e-9)


def test_the_linear_schedule_ends_where_ddpm_ends_and_the_scaled_one_where_stable_diffusion_does() -> None:
    one = torch.ones((), dtype=torch.float64)
    for path, alpha in ((LinearBetas(), 0.00635), (ScaledLinearBetas(), 0.0683)):
        assert path.alpha(one).item() == pytest.approx(alpha, rel=1e-2)
        # As a share of noise on the line: 0.99369 and 0.93596 (flow maps from published teachers need it).
        assert Linear().time(path.angle(one)).item() == pytest.approx(
            {0.00635: 0.99369, 0.0683: 0.93596}[alpha], abs=1e-4
        )


def test_the_rescaled_schedule_is_that_of_the_paper_and_ends_in_pure_noise() -> None:
    plain, rescaled = ScaledLinearBetas(), ScaledLinearBetas(zero_terminal_snr=True)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(plain.betas), 0)
    torch.testing.assert_close(rescaled.alpha_bar, theirs, rtol=1e-9, atol=1e-12)
    assert rescaled.alpha_bar[-1] == 0 and rescaled.alpha_bar[0] == pytest.approx(plain.alpha_bar[0].item())
    assert rescaled.alpha(torch.ones(1).double()).abs() < 1e-15


@every_schedule
def test_the_path_goes_through_every_level_and_starts_at_the_data(name: str) -> None:
    path = SCHEDULES[name]
    t = torch.arange(1, path.num_steps + 1, dtype=torch.float64) / path.num_steps
    torch.testing.assert_close(path.alpha(t).square(), path.alpha_bar, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(path.sigma(t).square(), 1 - path.alpha_bar, rtol=1e-10, atol=1e-13)
    start = torch.zeros(1, dtype=torch.float64)
    assert path.alpha(start) == 1 and path.sigma(start) == 0


@every_schedule
def test_the_path_is_smooth_and_has_the_derivatives_that_it_says(name: str) -> None:
    path, t = (
        SCHEDULES[name],
        torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    t.requires_grad_()
    for coefficient, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (expected,) = torch.autograd.grad(coefficient(t).sum(), t)
        torch.testing.assert_close(derivative(t), expected)
    knots = torch.arange(1, path.num_steps, dtype=torch.float64) / path.num_steps
    before, after = path.sigma_dot(knots - 1e-12), path.sigma_dot(knots + 1e-12)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)
    for end in (TIMES[:1], TIMES[-1:]):
        assert path.alpha_dot(end).isfinite() and path.sigma_dot(end).isfinite()


@every_schedule
def test_single_precision_knows_the_coefficients_to_six_digits(name: str) -> None:
    path = SCHEDULES[name]
    for coefficient in (path.alpha, path.sigma):
        found = coefficient(TIMES.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), coefficient(TIMES), rtol=0, atol=3e-6)


@every_path
def test_noise_grows_along_a_path_and_its_level_tells_the_time(name: str) -> None:
    path = PATHS[name]
    angle = path.angle(TIMES)
    assert (angle.diff() > 0).all()
    torch.testing.assert_close(path.time(angle), TIMES, rtol=0, atol=1e-12)
    torch.testing.assert_close(path.snr(TIMES[1:]), angle[1:].tan() ** -2, rtol=1e-6, atol=1e-9)
    inner = TIMES[20:-20].clone().requires_grad_()
    (expected,) = torch.autograd.grad(path.snr(inner).log().sum(), inner)
    torch.testing.assert_close(path.log_snr_dot(inner), expected)


@every_schedule
def test_times_are_rounded_up_to_a_step(name: str) -> None:
    path = SCHEDULES[name]
    n = path.num_steps
    t = torch.tensor([1e-6, 0.5 / n, 1.5 / n, 1 - 1e-9]).double()
    torch.testing.assert_close(path.on_grid(t) * n, torch.tensor([1, 1, 2, n]).double())
    assert torch.equal(Linear().on_grid(t), t)
    steps = torch.arange(1, n + 1) / n  # in float32, where a step of 1000 is not exact
    assert torch.equal(path.on_grid(steps), steps)


@every_path
@pytest.mark.parametrize("data_std", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["velocity", "noise", "data", "v"])
def test_any_prediction_gives_back_the_end_points(name: str, kind: Any, data_std: float) -> None:
    path, batch, t = PATHS[name], gaussian_batch(64), torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    data, noise = batch.data, batch.noise()
    said = path.target(data, noise, t, kind=kind, data_std=data_std)
    found = path.end_points(path.state(data, noise, t), said, t, kind=kind, data_std=data_std)
    torch.testing.assert_close(found, (data, noise), rtol=1e-9, atol=1e-10)
    # What an error of the prediction does to the noise is what `noise_error` says.
    wrong = path.end_points(path.state(data, noise, t), said + 1, t, kind=kind, data_std=data_std)
    size = (wrong[1] - noise).abs()[:, 0]
    torch.testing.assert_close(size, path.noise_error(t, kind=kind, data_std=data_std), rtol=1e-8, atol=1e-9)


@every_path
def test_at_both_ends_v_says_what_there_is_to_say(name: str) -> None:
    path, batch = PATHS[name], gaussian_batch(2)
    t = torch.tensor([0.0, 1.0]).double()
    data, noise = batch.data, batch.noise()
    said = path.target(data, noise, t, kind="v", data_std=0.5)
    found = path.end_points(path.state(data, noise, t), said, t, kind="v", data_std=0.5)
    torch.testing.assert_close(found, (data, noise))


def test_v_with_the_spread_of_the_data_is_the_preconditioning_of_edm() -> None:
    """D(y) = c_skip y + c_out F(c_in y), written out as in table 1, for F = -v."""
    spread, sigma = 0.5, torch.logspace(-3, 2, 50, dtype=torch.float64)
    t = Linear().time(sigma.atan())
    torch.testing.assert_close(t, torch.sigmoid(sigma.log()))
    torch.testing.assert_close(t / (1 - t), sigma)
    y = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    F = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    r = (sigma**2 + spread**2)[:, None]
    expected = spread**2 / r * y + sigma[:, None] * spread / r.sqrt() * F
    x = y * (1 - t)[:, None]
    data, noise = Linear().end_points(x, -F, t, kind="v", data_std=spread)
    torch.testing.assert_close(data, expected)
    torch.testing.assert_close(noise, (y - expected) / sigma[:, None])
    torch.testing.assert_close(x / Linear().scale(t, data_std=spread)[:, None], y / r.sqrt())


def test_a_shift_multiplies_the_noise_level_of_the_line() -> None:
    t = TIMES[1:-1]
    torch.testing.assert_close(shifted(t, 3.0) / (1 - shifted(t, 3.0)), 3 * t / (1 - t))
    torch.testing.assert_close(time_grid(7, shift=3.0), shifted(time_grid(7), 3.0))


def test_the_noise_grid_has_the_levels_of_edm() -> None:
    grid = noise_grid(18, Linear())
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose((grid / (1 - grid))[:-1].numpy(), expected, rtol=1e-9)
    assert grid[-1] == 0 and len(grid) == 19 and len(noise_grid(1, Linear())) == 2
    beyond = noise_grid(18, ScaledLinearBetas())
    assert beyond[0] == pytest.approx(1, abs=1e-12) and (beyond.diff() < 0).all()


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (
            LinearBetas,
            {"num_steps": 10},
            r"betas of 10 steps go from 0.01 to 2, expected numbers between 0 and 1",
        ),
        (LinearBetas, {"first": 0.0}, r"take more steps or smaller betas"),
        (Cosine, {"num_steps": 1}, "num_steps is 1, expected at least 2"),
    ],
)
def test_a_schedule_that_is_none_is_refused(kind: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_posterior_variances_are_those_of_two_gaussians_multiplied() -> None:
    path = LinearBetas(num_steps=50)
    beta, levels = path.betas[1:], path.alpha_bar[:-1]
    precision = (1 - beta) / beta + 1 / (1 - levels)  # of q(x_n | x_{n-1}) and q(x_{n-1} | data)
    torch.testing.assert_close(path.posterior_variance[1:], 1 / precision)
    assert path.posterior_variance[0] == 0 and math.isclose(path.betas[0], 1 - path.alpha_bar[0])
