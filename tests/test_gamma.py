"""Gamma sampling keeps the path's distribution for every gamma, path and grid, where the map is exact."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Path
from driftmap.models.samplers import gamma, jump, sampler_of, time_grid
from driftmap.trainer.seeds import Random
from oracle import PATHS, carried, exact

MANY = Random(11, torch.arange(4000))
FEW = Random(12, torch.arange(16))
GRIDS = [
    time_grid(2),
    time_grid(5),
    time_grid(3, shift=4.0),
    torch.tensor([1, 0.6, 0.6, 0.6, 0.2, 0], dtype=torch.float64),
]


def draws(random: Random) -> Any:
    return lambda number: random.normal(f"step {number}", (5,)).double()


class ExactMap(FlowMap):
    """The exact flow map of N(0.7, 0.4^2) along any path."""

    def __init__(self, path: Path) -> None:
        super().__init__(torch.nn.Identity(), path)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, condition: None = None) -> Tensor:
        """Return X_{s,t}(x)."""
        return carried(x, self.path, s[0].double(), t[0].double())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("grid", GRIDS, ids=["2", "5", "shifted", "restart"])
@pytest.mark.parametrize("name", PATHS)
def test_samples_are_of_the_data_for_every_gamma(name: str, grid: Tensor, share: float) -> None:
    """From what the path really ends with, mean and spread are the data's within four standard errors."""
    path = PATHS[name]
    one = torch.ones(()).double()
    data = 0.7 + 0.4 * MANY.normal("data", (5,)).double()
    x = path.alpha(one) * data + path.sigma(one) * MANY.normal("noise", (5,)).double()
    found = gamma(ExactMap(path), x, grid=grid, path=path, draw=draws(MANY), gamma=share)
    count = found.numel()
    assert abs(found.mean() - 0.7) < 4 * 0.4 / math.sqrt(count)
    assert abs(found.std() - 0.4) < 4 * 0.4 / math.sqrt(2 * count)


@pytest.mark.parametrize("name", PATHS)
def test_a_step_is_the_written_out_one(name: str) -> None:
    """To a state of 0.6 of the noise level of t, then to the scale of t with 0.8 sigma of noise."""
    path, x = PATHS[name], FEW.normal("noise", (5,)).double()
    s, t = torch.tensor(0.9).double(), torch.tensor(0.4).double()
    found = gamma(ExactMap(path), x, grid=torch.stack([s, t]), path=path, draw=draws(FEW), gamma=0.8)
    level = 0.6 * path.sigma(t) / path.alpha(t)
    spread = (0.4**2 + level**2).sqrt()  # of data + level noise, a state at alpha = 1
    before = ((path.alpha(s) * 0.4) ** 2 + path.sigma(s) ** 2).sqrt()
    state = 0.7 + spread / before * (x - path.alpha(s) * 0.7)
    expected = path.alpha(t) * state + 0.8 * path.sigma(t) * draws(FEW)(0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_without_noise_it_is_the_jumps_bit_for_bit() -> None:
    noise, grid = FEW.normal("noise", (5,)), time_grid(3)
    model = exact()
    expected = jump(model, noise, grid=grid)
    assert torch.equal(gamma(model, noise, grid=grid, path=model.path, gamma=0.0), expected)
    outside = sampler_of("gamma:gamma=1,low=0.7", path=model.path, draw=draws(FEW))
    assert torch.equal(outside.sample(model, noise, grid=grid), expected)


def test_all_noise_is_the_multistep_sampling_of_consistency_models() -> None:
    model, noise, grid = exact(path="trig"), FEW.normal("noise", (5,)).double(), time_grid(2)
    end = torch.zeros(16).double()
    data = model.jump(noise, end + 1, end)
    angle = torch.tensor(math.pi / 4, dtype=torch.float64)
    again = angle.cos() * data + angle.sin() * draws(FEW)(0)
    expected = model.jump(again, end + 0.5, end)
    model = FlowMap(model.backbone, PATHS["quarter circle"])
    found = gamma(model, noise, grid=grid, path=model.path, draw=draws(FEW), gamma=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_restart_is_a_time_that_the_grid_has_again() -> None:
    """Xu et al.: from 0.6 down to 0.3 and up again with fresh noise, twice, then on to the data."""
    path, x = PATHS["line"], FEW.normal("noise", (5,)).double()
    share = math.sqrt(1 - ((0.3 / 0.7) / (0.6 / 0.4)) ** 2)
    grid = torch.tensor([1, 0.6, 0.6, 0], dtype=torch.float64)
    found = gamma(ExactMap(path), x, grid=grid, path=path, draw=draws(FEW), gamma=share)
    high, low = grid[1], torch.tensor(0.3, dtype=torch.float64)
    x = carried(x, path, grid[0], low)
    for number in range(2):
        kept = 0.4 / 0.7
        x = kept * x + math.sqrt(0.6**2 - (kept * 0.3) ** 2) * draws(FEW)(number)
        x = carried(x, path, high, low)
    torch.testing.assert_close(found, carried(x, path, low, grid[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "text, message",
    [
        ("gamma:gamma=1.5", "gamma is 1.5, expected a share from 0"),
        ("gamma:gamma=half", "sampler gamma: gamma is 'half', expected a number"),
        ("gamma:eta=1", "its settings are gamma, high, low, as in gamma:key=value"),
    ],
)
def test_a_wrong_setting_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler = sampler_of(text, path=PATHS["line"], draw=draws(FEW))
        sampler.sample(exact(), torch.zeros(16, 5), grid=time_grid(2))


def test_noise_needs_where_it_comes_from() -> None:
    with pytest.raises(ValueError, match="gamma 0.5 draws noise at each step; give draw"):
        gamma(exact(), torch.zeros(16, 5), grid=time_grid(2), path=PATHS["line"])
