"""Samplers converge at their declared order, the exact map needs one jump, and samples are as the data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.samplers import euler, heun, jump, time_grid
from driftmap.trainer.seeds import Random
from oracle import CLASS_MEANS, exact

PATHS = ["linear", "trig"]
NOISE = Random(0, torch.arange(64)).normal("noise", (5,)).double()
BOTH_ENDS = torch.ones(64).double(), torch.zeros(64).double()


def error(sampler: Any, path: Any, num_steps: int) -> float:
    """Return the rms error against the closed form."""
    flow = exact(path=path)
    found = sampler(flow, NOISE, grid=time_grid(num_steps))
    return (found - flow.jump(NOISE, *BOTH_ENDS)).square().mean().sqrt().item()


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("path", PATHS)
def test_the_measured_order_is_the_declared_one(sampler: Any, order: int, path: str) -> None:
    coarse, fine = error(sampler, path, 128), error(sampler, path, 256)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_one_step_is_the_written_out_one() -> None:
    """The order does not tell a velocity at the start of a step from one at its end."""
    flow, (s, t) = exact(), (torch.full((64,), time).double() for time in (0.9, 0.6))
    grid = torch.tensor([0.9, 0.6]).double()
    first = flow.velocity(NOISE, s)
    second = flow.velocity(NOISE - 0.3 * first, t)
    torch.testing.assert_close(euler(flow, NOISE, grid=grid), NOISE - 0.3 * first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        heun(flow, NOISE, grid=grid), NOISE - 0.15 * (first + second), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("grid", [time_grid(1), time_grid(2), time_grid(7, shift=3.0)])
@pytest.mark.parametrize("path", PATHS)
def test_jumps_of_the_exact_map_are_exact_in_any_steps(path: Any, grid: Tensor) -> None:
    """The map of N(0.7, 0.4^2) takes the noise n to 0.7 + 0.4 n."""
    found = jump(exact(path=path), NOISE, grid=grid)
    torch.testing.assert_close(found, 0.7 + 0.4 * NOISE, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sampler, num_steps", [(jump, 1), (jump, 4), (euler, 200), (heun, 40)])
def test_samples_have_the_mean_and_the_spread_of_the_data(sampler: Any, num_steps: int) -> None:
    noise = Random(1, torch.arange(4000)).normal("noise", (5,)).double()
    samples = sampler(exact(), noise, grid=time_grid(num_steps))
    assert abs(samples.mean() - 0.7) < 4 * 0.4 / math.sqrt(20_000)
    assert abs(samples.std() - 0.4) < 4 * 0.4 / math.sqrt(2 * 20_000)


@pytest.mark.parametrize("sampler, num_steps", [(jump, 2), (euler, 400), (heun, 40)])
def test_each_sample_is_of_the_class_asked_for(sampler: Any, num_steps: int) -> None:
    labels = torch.arange(64) % 2
    samples = sampler(exact(), NOISE, grid=time_grid(num_steps), condition=labels)
    expected = torch.tensor(CLASS_MEANS).double()[labels, None] + 0.4 * NOISE
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("sampler", [jump, euler, heun])
def test_sampling_keeps_the_dtype_and_builds_no_graph(sampler: Any) -> None:
    noise = NOISE.float().requires_grad_()
    samples = sampler(exact(), noise, grid=time_grid(2))
    assert samples.dtype == torch.float32 and not samples.requires_grad
