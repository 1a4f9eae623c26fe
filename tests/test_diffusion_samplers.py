"""Samplers along a path have their declared order, their noise has its variance, and diffusers agrees."""

import math
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from driftmap.models.denoiser import Denoiser
from driftmap.models.path import Linear, Path
from driftmap.models.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver,
    edm,
    euler,
    heun,
    noise_grid,
    sampler_of,
    scheduler,
    time_grid,
)
from driftmap.models.schedule import Cosine, LinearBetas, ScaledLinearBetas
from driftmap.trainer.seeds import Random
from oracle import PATHS, Posterior, carried

every_path = pytest.mark.parametrize("name", PATHS)
RANDOM = Random(0, torch.arange(64))
NOISE = RANDOM.normal("noise", (5,)).double()


def draws(random: Random) -> Any:
    return lambda number: random.normal(f"step {number}", (5,)).double()


def exact(path: Path, prediction: Any = "velocity", **settings: Any) -> Denoiser:
    return Denoiser(Posterior(path, prediction, **settings), path, prediction=prediction)


ORDERS = [(euler, 1), (ddim, 1), (heun, 2), (dpm_solver, 2), (edm, 2)]


@every_path
@pytest.mark.parametrize("sampler, order", ORDERS, ids=lambda value: getattr(value, "__name__", None))
def test_the_measured_order_is_the_declared_one(sampler: Any, order: int, name: str) -> None:
    """Between inner times: at the ends a chain's clock, and the logarithm of the noise, are not smooth."""
    path, counts = PATHS[name], (20, 40, 80)
    method = sampler if sampler in (euler, heun) else partial(sampler, path=path)
    start, end = torch.tensor(0.9).double(), torch.tensor(0.3).double()
    x = path.alpha(start) * 0.7 + NOISE  # any state
    if sampler is edm:  # it starts from noise
        x = path.sigma(start) * NOISE
    errors = []
    for count in counts:
        grid = start + (end - start) * torch.linspace(0, 1, count + 1, dtype=torch.float64)
        found = method(exact(path), NOISE if sampler is edm else x, grid=grid)
        errors.append((found - carried(x, path, start, end)).square().mean().sqrt().log2().item())
    slope = (errors[0] - errors[-1]) / (len(counts) - 1)
    assert slope == pytest.approx(order, abs=0.15)


@every_path
def test_from_noise_to_data_all_come_to_the_end_of_the_flow(name: str) -> None:
    path, grid = PATHS[name], time_grid(100)
    expected = carried(NOISE, path, grid[0], grid[-1])
    for method in (euler, heun, partial(ddim, path=path), partial(dpm_solver, path=path)):
        torch.testing.assert_close(method(exact(path), NOISE, grid=grid), expected, rtol=0, atol=0.1)
    levels = noise_grid(60, path)
    start = path.sigma(levels[0]) * NOISE
    found = edm(exact(path), NOISE, grid=levels, path=path)
    torch.testing.assert_close(found, carried(start, path, levels[0], levels[-1]), rtol=0, atol=0.02)


@pytest.mark.parametrize("variance, eta", [("fixed_small", 1.0), ("fixed_small", 0.5), ("fixed_large", None)])
def test_a_step_with_noise_has_the_mean_and_the_variance_of_the_posterior(variance: Any, eta: Any) -> None:
    """For data that are one point the posterior is q(x_{n-1} | x_n, data): DDPM's eqs. 6 and 7."""
    path, n, many = LinearBetas(num_steps=100), 40, 100_000
    beta, levels = path.betas, path.alpha_bar
    b, now, before = beta[n - 1], levels[n - 1], levels[n - 2]
    x = torch.full((many, 5), 0.3, dtype=torch.float64)
    random = Random(1, torch.arange(many))
    grid = torch.tensor([n / 100, (n - 1) / 100], dtype=torch.float64)
    model = exact(path, "noise", std=0.0)
    settings: dict[str, Any] = {"grid": grid, "path": path, "draw": draws(random)}
    if variance == "fixed_large" or eta == 1:
        found = ddpm(model, x, variance=variance, **settings)
    else:
        found = ddim(model, x, eta=eta, **settings)
    mean = before.sqrt() * b / (1 - now) * 0.7 + (1 - b).sqrt() * (1 - before) / (1 - now) * 0.3
    posterior = b * (1 - before) / (1 - now)
    spread = (b if variance == "fixed_large" else posterior * eta**2).sqrt().item()
    if eta == 0.5:
        noise = (0.3 - now.sqrt() * 0.7) / (1 - now).sqrt()
        mean = before.sqrt() * 0.7 + (1 - before - posterior / 4).sqrt() * noise
    bound = 5 * spread / math.sqrt(5 * many)
    assert abs(found.mean().item() - mean.item()) < bound
    assert found.std().item() == pytest.approx(spread, rel=5 / math.sqrt(10 * many))


def test_ddim_with_all_its_noise_is_ddpm() -> None:
    path, grid = LinearBetas(), time_grid(20)
    settings: dict[str, Any] = {"grid": grid, "path": path, "draw": draws(RANDOM)}
    first, second = ddim(exact(path), NOISE, eta=1.0, **settings), ddpm(exact(path), NOISE, **settings)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, ddim(exact(path), NOISE, **settings), atol=0.1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_chain_has_the_mean_and_the_spread_of_its_own_recursion(variance: Any) -> None:
    """For Gaussian data each step is linear in the state, so the end of the chain is known exactly."""
    path, c = LinearBetas(num_steps=100), 0.4
    levels = torch.cat([torch.ones(1).double(), path.alpha_bar])
    offset, square = -levels[-1].sqrt() * 0.7, 1.0
    for n in range(100, 0, -1):
        now, before = levels[n], levels[n - 1]
        beta = 1 - now / before
        spread = now * c**2 + 1 - now
        of_data, of_state = before.sqrt() * beta / (1 - now), (1 - beta).sqrt() * (1 - before) / (1 - now)
        slope = of_data * now.sqrt() * c**2 / spread + of_state
        added = 0 if n == 1 else beta * (1 - before) / (1 - now) if variance == "fixed_small" else beta
        offset, square = slope * offset, slope**2 * square + added
    random = Random(2, torch.arange(4000))
    noise = random.normal("noise", (5,)).double()
    settings: dict[str, Any] = {"grid": time_grid(100), "path": path, "draw": draws(random)}
    found = ddpm(exact(path), noise, variance=variance, **settings)
    std = math.sqrt(square)
    assert abs(found.mean().item() - (0.7 + float(offset))) < 4 * std / math.sqrt(20_000)
    assert found.std().item() == pytest.approx(std, rel=4 / math.sqrt(40_000))
    assert std == pytest.approx(0.4, abs=0.04)


def test_churn_adds_noise_and_keeps_the_distribution() -> None:
    path, random = Linear(), Random(3, torch.arange(2000))
    noise = random.normal("noise", (5,)).double()
    still = edm(exact(path), noise, grid=noise_grid(80, path), path=path)
    churned = edm(exact(path), noise, grid=noise_grid(80, path), path=path, churn=40.0, draw=draws(random))
    assert (still - churned).std() > 0.3
    assert abs(churned.mean().item() - 0.7) < 0.02 and churned.std().item() == pytest.approx(0.4, abs=0.02)
    nowhere = edm(
        exact(path), noise, grid=noise_grid(80, path), path=path, churn=40.0, low=1e9, draw=draws(random)
    )
    assert torch.equal(nowhere, still)


STOCHASTIC: dict[str, Any] = {
    "ddpm": lambda noise, draw: ddpm(exact(Linear()), noise, grid=time_grid(5), path=Linear(), draw=draw),
    "ddim": lambda noise, draw: ddim(
        exact(Linear()), noise, grid=time_grid(5), path=Linear(), eta=1, draw=draw
    ),
    "edm": lambda noise, draw: edm(
        exact(Linear()), noise, grid=noise_grid(5, Linear()), path=Linear(), churn=5, draw=draw
    ),
    "diffusers": lambda noise, draw: scheduler(
        exact(LinearBetas()), noise, grid=time_grid(5), name="DDPMScheduler", path=LinearBetas()
    ),
}


@pytest.mark.parametrize("method", STOCHASTIC)
def test_the_same_picture_comes_from_any_number_of_processes(method: str) -> None:
    """A process holds some of the samples: the noise of a step, too, is the sample's own."""

    def of(index: Tensor) -> Tensor:
        random = Random(7, index)
        return STOCHASTIC[method](random.normal("noise", (5,)).double(), draws(random))

    whole = of(torch.arange(6))
    assert torch.equal(
        whole, torch.cat([of(torch.tensor([0, 2])), of(torch.tensor([4, 1, 3, 5]))])[[0, 3, 1, 4, 2, 5]]
    )


class Crooked:
    """A velocity that no Gaussian has, so that solvers are compared where they err."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def velocity(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Return dx/dt (B, 5)."""
        time = t[:, None]
        data = (2 * x + 3 * time).sin() + 0.3 * time
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        return self.path.velocity(data, (x - alpha * data) / sigma, t)


DISCRETE = {"linear betas": LinearBetas(), "scaled": ScaledLinearBetas(), "cosine": Cosine()}


@pytest.mark.parametrize("path", DISCRETE.values(), ids=DISCRETE)
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize(
    "ours, theirs",
    [(ddim, "DDIMScheduler"), (dpm_solver, "DPMSolverMultistepScheduler")],
    ids=["ddim", "dpm"],
)
def test_ours_are_those_of_diffusers(ours: Any, theirs: str, num_steps: int, path: Any) -> None:
    grid, model = time_grid(num_steps), Crooked(path)
    found = ours(model, NOISE, grid=grid, path=path)
    expected = scheduler(model, NOISE, grid=grid, name=theirs, path=path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_on_the_line_euler_is_the_scheduler_of_flow_matching() -> None:
    grid, model = time_grid(10, shift=2.0), Crooked(Linear())
    expected = scheduler(model, NOISE, grid=grid, name="FlowMatchEulerDiscreteScheduler", path=Linear())
    torch.testing.assert_close(euler(model, NOISE, grid=grid), expected, rtol=0, atol=1e-5)


THEIRS = {
    "linear betas": [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
    "line": [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
}


@pytest.mark.parametrize("path, name", [(path, name) for path in THEIRS for name in THEIRS[path]])
def test_schedulers_of_diffusers_give_the_data_back(path: str, name: str) -> None:
    random = Random(5, torch.arange(2000))
    noise = random.normal("noise", (5,)).double()
    along = PATHS[path]
    sampler = sampler_of(f"diffusers:{name}", path=along, draw=draws(random))
    found = sampler.sample(exact(along), noise, grid=time_grid(50))
    assert abs(found.mean().item() - 0.7) < 0.05
    # Chains with noise have too little spread in few steps: the posterior's variance is the smallest.
    assert found.std().item() == pytest.approx(
        0.4, abs=0.07 if "Ancestral" in name or "DDPM" in name else 0.04
    )


@pytest.mark.parametrize("name", SAMPLERS.keys() - {"backward"})  # which takes no denoiser
def test_every_sampler_is_found_by_its_name(name: str) -> None:
    path = Linear()
    sampler = sampler_of(name, path=path, draw=draws(RANDOM))
    grid = sampler.grid(50)
    calls = 0

    class Counting(Denoiser):
        def predict(self, *inputs: Any, **settings: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return super().predict(*inputs, **settings)

    found = sampler.sample(
        Counting(Posterior(path, "velocity"), path, prediction="velocity"), NOISE, grid=grid
    )
    assert abs(found.mean().item() - 0.7) < 0.2
    assert calls == 50 * sampler.evaluations - (name == "edm")


def test_clipping_keeps_the_data_predicted_in_its_range() -> None:
    path = LinearBetas()
    for method in (partial(ddpm, draw=draws(RANDOM)), ddim, dpm_solver):
        found = method(exact(path), 3 * NOISE, grid=time_grid(10), path=path, clip=0.8)
        assert (
            found.abs().max()
            <= 0.8 + 1e-9
            < method(exact(path), 3 * NOISE, grid=time_grid(10), path=path).max()
        )


def test_a_sampler_takes_its_settings_with_its_name() -> None:
    path, grid = LinearBetas(), time_grid(10)
    noisy = sampler_of("ddim:eta=1", path=path, draw=draws(RANDOM)).sample(exact(path), NOISE, grid=grid)
    assert torch.equal(noisy, ddim(exact(path), NOISE, grid=grid, path=path, eta=1.0, draw=draws(RANDOM)))
    large = sampler_of("ddpm:variance=fixed_large,clip=1", path=path, draw=draws(RANDOM))
    expected = ddpm(
        exact(path), NOISE, grid=grid, path=path, draw=draws(RANDOM), variance="fixed_large", clip=1.0
    )
    assert torch.equal(large.sample(exact(path), NOISE, grid=grid), expected)
    for text, message in (
        (
            "ddim:etta=1",
            "sampler ddim: no such setting 'etta=1'; its settings are clip, eta, as in ddim:key=value",
        ),
        ("edm:churn", "no such setting 'churn'; its settings are churn, high, low, spread"),
        ("euler:eta=1", "sampler euler: no such setting 'eta=1'; it has none"),
    ):
        assert message in refusal(sampler_of, text, path=path, draw=draws(RANDOM))
    wrong = sampler_of("ddpm:variance=big", path=path, draw=draws(RANDOM))
    assert "variance is 'big', expected one of fixed_small, fixed_large" in refusal(
        wrong.sample, exact(path), NOISE, grid=grid
    )


def refusal(function: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as refused:
        function(*arguments, **settings)
    return str(refused.value)


def test_what_cannot_be_sampled_is_refused() -> None:
    line, chain = Linear(), LinearBetas()
    grid = time_grid(4)
    assert refusal(ddim, exact(line), NOISE, grid=grid, path=line, eta=0.5) == (
        "eta 0.5 draws noise at each step; give draw, or set eta to 0"
    )
    assert refusal(edm, exact(line), NOISE, grid=noise_grid(4, line), path=line, churn=1.0) == (
        "churn 1.0 draws noise at each step; give draw, or set churn to 0"
    )
    assert "the noise level is infinite at the first time; give noise_grid" in refusal(
        edm, exact(line), NOISE, grid=grid, path=line
    )
    assert "there is no sampler 'dpm'; there are jump, euler, heun" in refusal(
        sampler_of, "dpm", path=line, draw=draws(RANDOM)
    )
    theirs = partial(scheduler, exact(chain), NOISE, path=chain)
    assert refusal(theirs, grid=time_grid(4, shift=2.0), name="DDIMScheduler") == (
        "DDIMScheduler has its own times; give the even grid time_grid(4)"
    )
    assert (
        refusal(theirs, grid=grid, name="Linear")
        == f"diffusers {diffusers.__version__} has no scheduler 'Linear'"
    )
    assert "FlowMatchEulerDiscreteScheduler cannot go along LinearBetas(" in refusal(
        theirs, grid=grid, name="FlowMatchEulerDiscreteScheduler"
    )
