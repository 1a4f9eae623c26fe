"""Adaptive jumps are as many as the tolerance asks for, of each sample by itself, and the error follows."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.flow_map import FlowMap
from driftmap.models.samplers import adaptive, heun, jump, sampler_of, time_grid
from driftmap.trainer.seeds import Random
from mixture import MixtureBackbone, exact_mixture
from oracle import CLASS_MEANS, Blind, exact

NOISE = Random(4, torch.arange(48)).normal("noise", (2,)).double()


class MeanSlope(MixtureBackbone):
    """The mean velocity of Heun's step: good over short jumps and bad over long ones."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: None = None) -> Tensor:
        """Return the mean velocity (B, 2)."""
        first = super().forward(x, s, s)
        return (first + super().forward(x + (t - s)[:, None] * first, t, t)) / 2


def sampled(model: FlowMap, noise: Tensor = NOISE, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return the data end of one step of the grid, halved as wanted, and the evaluations."""
    evaluations: list[Tensor] = []
    found = adaptive(model, noise, **{"grid": time_grid(1), "evaluated": evaluations.append} | settings)
    return found, evaluations[0]


@functools.cache
def truth() -> Tensor:
    return heun(exact_mixture(), NOISE, grid=time_grid(2000))


@pytest.mark.parametrize("backbone", [MixtureBackbone(), MeanSlope()], ids=["Euler", "Heun"])
def test_the_error_falls_with_the_tolerance_and_the_work_grows(backbone: Any) -> None:
    errors, work = [], []
    for tolerance in (0.3, 0.1, 0.03):
        found, evaluations = sampled(FlowMap(backbone), tolerance=tolerance, halvings=10)
        errors.append((found - truth()).square().mean().sqrt().item())
        work.append(evaluations.double().mean().item())
        assert errors[-1] < 5 * tolerance
    assert errors == sorted(errors, reverse=True) and work == sorted(work)
    assert errors[-1] < errors[0] / 2


def test_it_needs_less_than_even_jumps_of_the_same_error() -> None:
    model = FlowMap(MeanSlope())
    found, evaluations = sampled(model, tolerance=0.003)
    error = (found - truth()).square().mean().sqrt()
    even = [jump(model, NOISE, grid=time_grid(count)) for count in (4, 8, 16)]
    errors = [(each - truth()).square().mean().sqrt() for each in even]
    assert evaluations.double().mean() < 60
    assert error < min(errors[:2])


def test_samples_take_their_own_number_alone_or_beside_others() -> None:
    model = FlowMap(MeanSlope())
    found, evaluations = sampled(model, tolerance=0.02)
    assert len(evaluations.unique()) > 2
    for number in range(0, 48, 7):
        alone, took = sampled(model, NOISE[number : number + 1], tolerance=0.02)
        assert took.item() == evaluations[number]
        torch.testing.assert_close(alone[0], found[number], rtol=1e-12, atol=1e-12)
    order = torch.arange(47, -1, -1)
    again, took = sampled(model, NOISE[order], tolerance=0.02)
    assert torch.equal(took, evaluations[order])
    torch.testing.assert_close(again, found[order], rtol=1e-12, atol=1e-12)


def test_a_network_is_asked_only_about_samples_that_are_not_there_yet() -> None:
    asked = 0

    class Counted(MeanSlope):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: None = None) -> Tensor:
            nonlocal asked
            asked += len(x)
            return super().forward(x, s, t, condition)

    _, evaluations = sampled(FlowMap(Counted()), tolerance=0.02)
    assert asked == evaluations.sum() < 48 * evaluations.max()


@pytest.mark.parametrize("grid", [time_grid(1), time_grid(3, shift=2.0)], ids=["1", "3"])
def test_an_exact_map_is_never_halved(grid: Tensor) -> None:
    noise = Random(5, torch.arange(8)).normal("noise", (5,)).double()
    labels = torch.arange(8) % 2
    found, evaluations = sampled(exact(), noise, grid=grid, tolerance=1e-9, condition=labels)
    assert evaluations.tolist() == [3 * (len(grid) - 1)] * 8
    expected = torch.tensor(CLASS_MEANS).double()[labels, None] + 0.4 * noise
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("halvings, jumps, evaluations", [(0, 2, 3), (1, 4, 8), (3, 16, 38)])
def test_a_tolerance_that_is_never_met_ends_with_the_finest_jumps(
    halvings: int, jumps: int, evaluations: int
) -> None:
    """Three evaluations, and five more for every time that a jump is halved."""
    noise = Random(5, torch.arange(8)).normal("noise", (5,)).double()
    found, took = sampled(FlowMap(Blind()), noise, tolerance=1e-12, halvings=halvings)
    assert took.tolist() == [evaluations] * 8
    torch.testing.assert_close(found, jump(FlowMap(Blind()), noise, grid=time_grid(jumps)))


@pytest.mark.parametrize("text", ["adaptive:tolerance=0", "adaptive:halvings=1.5", "adaptive:halvings=-1"])
def test_a_wrong_setting_is_refused(text: str) -> None:
    sampler = sampler_of(text, path=exact().path, draw=lambda step: NOISE)
    with pytest.raises(ValueError, match="expected a positive number .* and a whole number from 0"):
        sampler.sample(exact(), torch.zeros(2, 5), grid=time_grid(1))
