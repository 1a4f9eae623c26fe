"""An exact map agrees with itself over all sources and targets, a wrong one does not; grids are searched."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.flow_map import FlowMap
from driftmap.models.samplers import heun, jump, time_grid
from driftmap.trainer.agreement import MIDDLES, TIMES, agreement, best_shift, rms
from driftmap.trainer.report import write_report
from driftmap.trainer.seeds import Random
from mixture import DATA, MixtureBackbone, exact_mixture
from oracle import Blind, GaussianBackbone, exact, gaussian_batch
from run_folders import make_evaluation, make_run

BATCH = gaussian_batch(64)


def off_diagonal(table: list[list[float]]) -> Tensor:
    return torch.tensor(table)[~torch.eye(len(TIMES), dtype=torch.bool)]


class Forward(GaussianBackbone):
    """Exact from noise to data, and has not learned the way back."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, torch.minimum(s, t), condition)


def test_an_exact_map_agrees_everywhere_and_a_student_at_birth_nowhere() -> None:
    for path in ("linear", "trig"):
        told = agreement(exact(path=path), BATCH.data, BATCH.noise())
        assert told["times"] == list(TIMES)
        for key in ("semigroup_gap", "round_trip"):
            assert off_diagonal(told[key]).max() < 1e-12
    told = agreement(FlowMap(Blind()), BATCH.data, BATCH.noise())
    for key in ("semigroup_gap", "round_trip"):
        assert off_diagonal(told[key]).min() > 1e-3


def test_the_tables_are_by_source_and_target() -> None:
    """A map without the way back has no gap where t < s, one where t > s, and never comes back."""
    told = agreement(FlowMap(Forward()), BATCH.data, BATCH.noise())
    gap = torch.tensor(told["semigroup_gap"])
    assert gap.tril().max() < 1e-12 < 1e-3 < gap.triu(1)[0, 1:].min()
    model = FlowMap(Forward())
    s, t = torch.full((64,), 0.8).double(), torch.full((64,), 0.2).double()
    x = 0.2 * BATCH.data + 0.8 * BATCH.noise()
    halves = model.jump(model.jump(x, s, (s + t) / 2), (s + t) / 2, t)
    assert gap[4, 1].item() == pytest.approx(rms(halves - model.jump(x, s, t)), abs=1e-12)
    trip = rms(model.jump(model.jump(x, s, t), t, s) - x)
    assert told["round_trip"][4][1] == pytest.approx(trip, rel=1e-6)


def test_the_gap_tells_where_an_inexact_map_is_wrong() -> None:
    """Euler's step in the mixture: the gap of a jump is of the size of its error."""
    data, noise = DATA.sample((64,)), Random(3, torch.arange(64)).normal("noise", (2,)).double()
    told = agreement(FlowMap(MixtureBackbone()), data, noise)
    for place, source in enumerate(TIMES[2:], start=2):
        s = torch.full((64,), source).double()
        x = (1 - source) * data + source * noise
        grid = source * time_grid(200)
        wrong = rms(FlowMap(MixtureBackbone()).jump(x, s, 0 * s) - heun(exact_mixture(), x, grid=grid))
        assert 0.3 * wrong < told["semigroup_gap"][place][0] < 2 * wrong


@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_best_shift_ends_nearest_to_the_teacher(num_steps: int) -> None:
    """Of Euler's steps towards narrow data most have to be near the data."""
    model, noise = FlowMap(Blind()), BATCH.noise()
    ends = jump(exact(), noise, grid=time_grid(1))
    found = best_shift(model, noise, ends, num_steps)
    tried = {
        middle: rms(jump(model, noise, grid=time_grid(num_steps, shift=middle / (1 - middle))) - ends)
        for middle in MIDDLES
    }
    best = min(tried, key=lambda middle: tried[middle])
    assert best < 0.5
    assert found["error"] == tried[best] < found["even_error"] == tried[0.5]
    assert found["shift"] == best / (1 - best)
    assert found["grid"] == time_grid(num_steps, shift=best / (1 - best)).tolist()
    if num_steps == 2:
        assert found["grid"] == pytest.approx([1, best, 0])


def test_a_report_shows_the_tables(tmp_path: Any) -> None:
    run = make_run(tmp_path / "run")
    file = make_evaluation(run / "evaluation.json")
    without = write_report(tmp_path / "without.html", runs=[run], evaluation=file).read_text()
    told = agreement(FlowMap(Blind()), BATCH.data, BATCH.noise())
    grids = {"2": {"shift": 1.5, "grid": [1, 0.6, 0], "error": 0.125, "even_error": 0.25}}
    jumps = {"num_samples": 64, **told, "grids": grids}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"jumps": jumps}))
    page = write_report(tmp_path / "with.html", runs=[run], evaluation=file).read_text()
    assert "How far the jumps" in page and "How far the jumps" not in without
    largest = max(map(max, told["round_trip"]))
    assert f'var(--bin-last) 60%, var(--page))">{largest:.2g}<' in page
    assert page.count('var(--bin-last) 0%, var(--page))">0<') == 2 * len(TIMES), "where source is target"
    assert "shifted by 1.500: 0.1250, against 0.2500 without a shift" in page
