"""The checkerboard bench: its KL is what it says, a killed training goes on exactly, every rule learns."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.autograd import forward_ad

from driftmap.data.synthetic import on_dark_squares
from driftmap.launch.bench import show
from driftmap.launch.bench_checkerboard import PUBLISHED, STEPS, Setting, Training, checkerboard
from driftmap.launch.checkerboard_measure import CELLS, NUM_SETS, batch, floor, kls, samples, title
from driftmap.models.backbones.mlp import MLP
from runs import driftmap

DARK = CELLS**2 // 2
SMALL = Setting(steps=8, batch_size=64, width=16, depth=1, num_samples=256)


def even_points(side):
    """Return as many points in every dark cell as in any other, the same in each set."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    uniform = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    return torch.from_numpy(np.tile(on_dark_squares(uniform), (NUM_SETS, 1)))


def test_equal_areas_become_equal_areas():
    x, y = even_points(256).numpy().astype(np.float64).T
    counts, *_ = np.histogram2d(x, y, bins=CELLS, range=[[-1, 1]] * 2)
    assert sorted(set(counts.flatten())) == [0, NUM_SETS * 256**2 / DARK]
    squares = np.floor(2 * x).astype(int) + np.floor(2 * y).astype(int)
    assert not (squares % 2).any()


def test_kl_of_even_points_is_zero_and_of_lost_ones_their_share():
    points = even_points(256)
    assert kls(points) == pytest.approx([0.0] * NUM_SETS, abs=1e-12)
    per_cell, lost = 256**2 / DARK, points.clone()
    # One of two points goes to the light square beside it, and one of four out of the board, in even cells.
    lost[::4] += torch.tensor([0.5, 0.0])
    lost[1::4] += 3
    kept = float(np.log((per_cell / 2 + 0.5) / (per_cell + 0.5)))
    assert kls(lost) == pytest.approx([-kept] * NUM_SETS, abs=1e-6)
    assert kls(points + 3) == pytest.approx([math.log(2 * per_cell + 1)] * NUM_SETS, abs=1e-12)


def test_kl_sees_which_squares_are_missed():
    points, per_cell = even_points(256), 256**2 / DARK
    points[:, 0] -= (points[:, 0] > 0).float()  # two columns to the left: half the cells twice, half empty
    full, empty = (2 * per_cell + 0.5) / (per_cell + 0.5), 0.5 / (per_cell + 0.5)
    assert kls(points) == pytest.approx([-math.log(full * empty) / 2] * NUM_SETS, abs=1e-12)


def test_floor_is_that_of_counting():
    many = 2**16
    assert floor(many) == pytest.approx([(DARK - 1) / (2 * many)] * NUM_SETS, rel=0.25)


def test_batches_are_a_stream_without_seams():
    whole, second = batch(0, 64, seed=3), batch(32, 32, seed=3)
    assert torch.equal(whole.data[32:], second.data)
    assert torch.equal(whole.noise()[32:], second.noise())
    assert (whole.step[0], second.step[0]) == (0, 1)
    assert not torch.equal(whole.data, batch(0, 64, seed=4).data)


@pytest.mark.parametrize("modulated", [False, True])
def test_waves_of_the_state_and_times_are_seen_and_differentiated(modulated):
    torch.manual_seed(0)
    network = MLP(width=16, state_frequencies=3, modulated=modulated).double()
    with torch.no_grad():
        for block in network.blocks:
            if modulated:  # which starts at zero
                block.modulation.weight.normal_()
    x, along, (s, t, later) = *torch.randn(2, 5, 2).double(), torch.rand(3, 5).double()
    step = 1e-5
    assert network.inputs.in_features == 2 + 2 * 2 * 3 + 4 * network.frequencies
    with forward_ad.dual_level():
        dual, end = forward_ad.make_dual(x, along), forward_ad.make_dual(t, later)
        _, slope = forward_ad.unpack_dual(network(dual, s, end))
    ahead, behind = (network(x + h * along, s, t + h * later) for h in (step, -step))
    assert torch.allclose(slope, (ahead - behind) / (2 * step), atol=1e-8)


def test_modulated_blocks_start_as_plain_ones_and_use_the_times():
    torch.manual_seed(0)
    network, (x, s, t) = MLP(width=16, modulated=True), (torch.randn(5, 2), torch.rand(5), torch.rand(5))
    before = network(x, s, t)
    plain = MLP(width=16)
    plain.load_state_dict(network.state_dict(), strict=False)
    assert torch.equal(plain(x, s, t), before)
    network.blocks[0].modulation.weight.data.normal_()
    assert not torch.allclose(network(x, s, t), before)


def test_a_killed_training_goes_on_exactly(tmp_path):
    class Killed(Training):
        def _step(self):
            if self.steps == 5:
                raise KeyboardInterrupt
            return super()._step()

    whole, file = Training("lagrangian", SMALL), tmp_path / "one.pt"
    whole.train(None, shown=False)
    with pytest.raises(KeyboardInterrupt):
        Killed("lagrangian", SMALL).train(file, shown=False)
    resumed = Training("lagrangian", SMALL)
    resumed.train(file, shown=False)
    assert [row["steps"] for row in resumed.curve] == [1, 2, 4, 8]
    assert resumed.steps == 8  # and 4 of them were made here
    for one, other in zip(resumed.curve, whole.curve, strict=True):
        assert {key: one[key] for key in "124"} == {key: other[key] for key in "124"}
    with resumed.averaged(), whole.averaged():
        noise = torch.randn(8, 2)
        assert torch.equal(samples(resumed.model, noise, 2), samples(whole.model, noise, 2))


def test_a_training_of_other_settings_is_refused(tmp_path):
    Training("semigroup", SMALL).train(tmp_path / "semigroup.pt", shown=False)
    with pytest.raises(ValueError, match="'seed': 0.*'seed': 1.*name another folder"):
        checkerboard(["semigroup"], Setting(**{**vars(SMALL), "seed": 1}), out=tmp_path, shown=False)


@pytest.mark.parametrize("rule", ["lagrangian", "eulerian", "semigroup"])
def test_every_rule_learns(rule):
    """Few and small steps, but samples in 4 jumps come nearer to the data."""
    setting = Setting(steps=80, batch_size=256, width=32, depth=1, lr=8e-3, num_samples=2048)
    training = Training(rule, setting)
    training.train(None, shown=False)
    assert training.curve[-1]["4"] < 0.85 * training.curve[0]["4"]


def test_the_table_and_the_pictures_are_of_what_was_measured(tmp_path):
    file, out = tmp_path / "rows.json", tmp_path / "out"
    measured = checkerboard(["lagrangian", "eulerian"], SMALL, out=out, shown=False)
    show(measured, file, Console(quiet=True))
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    for rule in ("lagrangian", "eulerian"):
        for n, published in zip(STEPS, PUBLISHED[rule], strict=True):
            row = rows[f"{rule} {title(n)}"]
            assert row["reference"] == published and row["ratio"] == pytest.approx(row["ours"] / published)
        own = rows[f"{rule} 4 steps / its own 100 steps, the flow"]
        assert own["ours"] == rows[f"{rule} 4 steps"]["ours"] != own["reference"]
    both = rows["lagrangian / eulerian, 2 steps"]
    assert both["ours"] == rows["lagrangian 2 steps"]["ours"]
    assert both["reference"] == rows["eulerian 2 steps"]["ours"]
    for name in ("samples", "map", "curves"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(set(picture.convert("L").getdata())) > 50


def test_the_command_says_which_rules_there_are(tmp_path):
    refused = driftmap("bench", "checkerboard", "--rule", "euler", logs=tmp_path).refused()
    assert "no rule 'euler'; there are lagrangian, eulerian" in refused
