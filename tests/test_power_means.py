"""A power mean is the weighted sum that the paper says, and a mean of any width is made of those of two."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from driftmap.data.synthetic import write_points
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.ema import Ema, Power, reconstruction, residual
from driftmap.trainer.fragment import Fragment
from driftmap.trainer.pieces import Pieces
from driftmap.trainer.posthoc import mean_of_width
from runs import driftmap, launched, read_losses, tree, write_config

WIDTHS = (0.05, 0.1)
STEPS = 40
TRUTH = "ema-power-0.07"


def profile(width: float, length: int) -> np.ndarray:
    """Return how much the weights of each step count: the integrals of the power function over the steps."""
    steps = np.arange(length + 1) / length
    return np.diff(steps ** (Power(width).gamma + 1))


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative distance of weights, all taken as one vector."""
    assert found.keys() == expected.keys()
    ours, theirs = (
        torch.cat([w[name].reshape(-1).double() for name in sorted(w)]) for w in (found, expected)
    )
    return float((ours - theirs).norm() / theirs.norm())


# The mean


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_the_recursion_is_the_weighted_sum_of_all_past_weights(width: float) -> None:
    torch.manual_seed(0)
    live = torch.full((200,), 1e3)  # of the birth weights nothing is left
    ema = Ema([Fragment("w", (200,), 0, live, live, live, writes=True)], {"mean": Power(width)})
    path = torch.randn(60, 200).cumsum(0)
    for n, weights in enumerate(path, start=1):
        live.copy_(weights)
        ema.update()
        expected = torch.from_numpy(profile(width, n)) @ path[:n].double()
        torch.testing.assert_close(ema.means["mean"][0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.2, 0.27])
def test_the_profile_is_as_wide_as_it_was_asked_to_be(width: float) -> None:
    """Its standard deviation is width times the length, but for the steps, of which each is one long.

    To put what happens during a step at its middle adds 1/12 + 1 / (6 (gamma + 2)) < 1/6 to the variance
    (by Euler and Maclaurin), so the relative error is below 1 / (12 (width length)^2).
    """
    length, kind = 5000, Power(width)
    counts = np.ones(length)
    for n in range(length):
        counts[:n] *= kind.keep(n)
        counts[n] = 1 - kind.keep(n)
    assert counts.sum() == pytest.approx(1, abs=1e-12)
    steps = np.arange(length)
    deviation = np.sqrt(counts @ steps**2 - (counts @ steps) ** 2)
    assert deviation / length == pytest.approx(width, rel=1 / (12 * (width * length) ** 2))


def test_the_exponent_of_a_width_is_that_of_the_paper() -> None:
    """Of its figures: 5 % is gamma 16.97, 10 % is 6.94."""
    assert [Power(width).gamma for width in WIDTHS] == pytest.approx([16.97, 6.94], abs=0.005)


# The sum of means


def tracked(
    path: torch.Tensor, widths: tuple[float, ...], every: int
) -> dict[tuple[int, float], torch.Tensor]:
    """Return the means of a path of weights by (updates, width), every so many updates."""
    live = path[0].clone()
    kinds = {str(width): Power(width) for width in widths}
    ema = Ema([Fragment("w", tuple(live.shape), 0, live, live, live, writes=True)], kinds)
    kept = {}
    for n, weights in enumerate(path, start=1):
        live.copy_(weights)
        ema.update()
        if n % every == 0:
            kept |= {(n, width): ema.means[str(width)][0].double() for width in widths}
    return kept


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.15])
def test_means_of_two_widths_give_that_of_a_third(wanted: float) -> None:
    """Also at steps before the last, from what was kept until then; the nearest kept mean is no answer."""
    torch.manual_seed(0)
    kept = tracked(torch.randn(1000, 500).cumsum(0), (*WIDTHS, wanted), every=25)
    for step in (500, 750, 1000):
        truth = kept[step, wanted]
        stored = [(n, width) for n, width in kept if width in WIDTHS and n <= step]
        shares = reconstruction(stored, (step, wanted))
        found = sum(share * kept[one] for share, one in zip(shares, stored, strict=True))
        error = (found - truth).norm() / truth.norm()
        nearest = min((kept[step, width] - truth).norm() / truth.norm() for width in WIDTHS)
        assert error < 1e-3 and nearest > 50 * error, (error, nearest)


def test_a_kept_mean_is_made_of_itself_alone() -> None:
    stored = [(n, width) for n in range(50, 1001, 50) for width in WIDTHS]
    for number, one in enumerate(stored):
        shares = reconstruction(stored, one)
        assert shares == pytest.approx(np.eye(len(stored))[number], abs=1e-8)
        assert residual(stored, one, shares) < 1e-7


@pytest.mark.parametrize("stored", [[(40, 0.1)], [(20, 0.1), (40, 0.1)], [(n, 0.1) for n in (7, 8, 40)]])
def test_weights_that_never_moved_stay_what_they_are_however_little_was_kept(stored) -> None:
    """The least squares of the paper alone would scale them, with one mean by 20 %."""
    shares = reconstruction(stored, (40, 0.07))
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert residual(stored, (40, 0.07), shares) > 0.01


def test_the_residual_is_the_distance_of_the_profiles() -> None:
    stored, wanted, length = [(300, 0.05), (600, 0.1), (1000, 0.1)], (1000, 0.07), 1000
    shares = reconstruction(stored, wanted)
    profiles = np.stack([np.pad(profile(width, n), (0, length - n)) for n, width in stored])
    truth = profile(0.07, length)
    expected = np.linalg.norm(shares @ profiles - truth) / np.linalg.norm(truth)
    assert residual(stored, wanted, shares) == pytest.approx(expected, rel=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):  # no other sum of the same total is nearer
        change = rng.standard_normal(3) * 0.01
        other = np.array(shares) + change - change.mean()
        assert np.linalg.norm(other @ profiles - truth) / np.linalg.norm(truth) > expected


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train the same weights twice, the second time with the mean that is to be reconstructed."""
    folder = tmp_path_factory.mktemp("means")
    points = write_points(folder / "moons", "moons", n=100, seed=0).folder
    for name, widths in (("run", WIDTHS), ("truth", (*WIDTHS, 0.07))):
        config = config_of(folder / f"{name}.yaml", points, ema__power_widths=list(widths))
        train(config, folder / name).succeeded()
    return folder


def config_of(file, points, **changes):
    settings = {
        "training": {"steps": STEPS, "save_every": 20, "log_every": 10},
        "ema": {"power_widths": list(WIDTHS), "snapshot_every": 5},
    }
    return write_config(file, points, **settings, **changes)


def train(config, run, *overrides, **disturbance):
    return driftmap(
        "train", config, *overrides, "--out", run, logs=run.parent / f"{run.name}.logs", **disturbance
    )


def ema(run, out, *more, width=0.07):
    return driftmap("ema", run, "--width", width, "--out", out, *more, logs=out.parent / "ema.logs")


@pytest.fixture
def copy(folder, tmp_path):
    """Copy the run, to be damaged."""
    return shutil.copytree(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("step", [20, STEPS])
def test_a_run_gives_the_mean_that_it_did_not_track(step, folder, tmp_path):
    out = tmp_path / "mean.safetensors"
    command = ema(folder / "run", out, *([] if step == STEPS else ["--step", step])).succeeded()
    place = f"step-{step:08d}"
    expected = Pieces(folder / "truth" / "ema" / place, TRUTH).all()
    kept = [Pieces(folder / "run" / "ema" / place, f"ema-power-{width}").all() for width in WIDTHS]
    error, nearest = distance(load_file(out), expected), min(distance(mean, expected) for mean in kept)
    assert error < 2e-3 and nearest > 5 * error, (error, nearest)
    with safe_open(out, "pt") as stream:
        told = stream.metadata()
    assert (float(told["width"]), int(told["step"])) == (0.07, step)
    assert 0 < float(told["residual"]) < 0.04
    assert f"width 0.07 at step {step}, the sum of {2 * step // 5} means" in command.stdout.replace("\n", " ")
    assert command.stderr == "" and out.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_kept_mean_comes_back_as_it_was(folder, tmp_path):
    out = tmp_path / "mean.safetensors"
    ema(folder / "run", out, width=0.1).succeeded()
    place = folder / "run" / "ema" / f"step-{STEPS:08d}"
    assert distance(load_file(out), Pieces(place, "ema-power-0.1").all()) < 1e-6


def test_snapshots_hold_what_the_checkpoint_of_their_step_holds(folder):
    run = folder / "run"
    places = sorted(place.name for place in (run / "ema").iterdir())
    assert places == [f"step-{step:08d}" for step in range(5, STEPS + 1, 5)]
    checkpoint = newest(run)
    held = json.loads((run / "ema" / checkpoint.folder.name / "manifest.json").read_text())
    there = json.loads((checkpoint.folder / "manifest.json").read_text())
    means = {f"ema-power-{width}-00001-of-00001.safetensors" for width in WIDTHS}
    assert held.keys() == {"state.json"} | means
    assert all(held[name] == there[name] for name in means)


def test_snapshots_change_nothing_about_the_run(folder, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        folder / "moons",
        training={"steps": STEPS, "save_every": 20, "log_every": 10},
    )
    train(config, tmp_path / "plain").succeeded()
    assert not (tmp_path / "plain" / "ema").exists()
    assert read_losses(tmp_path / "plain") == read_losses(folder / "run")
    for name, value in newest(tmp_path / "plain").weights("model").items():
        assert torch.equal(value, newest(folder / "run").weights("model")[name])


def test_what_a_killed_run_lost_is_made_anew_and_what_it_had_too_much_is_gone(copy, folder):
    """As if it was killed after step 30, the snapshot of its last checkpoint still on its way."""
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(copy / "ema" / "step-00000020")
    os.rename(copy / "ema" / "step-00000040", copy / "ema" / "step-00000041")
    (copy / "ema" / "step-00000035").rename(copy / "ema" / "step-00000035.tmp")
    train(folder / "run.yaml", copy).succeeded()
    assert tree(copy / "ema") == tree(folder / "run" / "ema")


def test_the_last_step_is_kept_though_no_period_ends(folder, tmp_path):
    train(folder / "run.yaml", tmp_path / "run", "training.steps=7").succeeded()
    assert sorted(os.listdir(tmp_path / "run" / "ema")) == ["step-00000005", "step-00000007"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_two_processes_keep_what_one_keeps(strategy, folder, tmp_path):
    words = ("train", folder / "run.yaml", f"strategy.name={strategy}", "--out", tmp_path / "two")
    for command in launched(2, *words, logs=tmp_path / "two"):
        command.succeeded()
    assert (
        len(list((tmp_path / "two" / "ema").glob("step-*/ema-power-0.05-0000?-of-00002.safetensors"))) == 16
    )
    found, expected = (mean_of_width(run, 0.07) for run in (tmp_path / "two", folder / "run"))
    assert distance(found.weights, expected.weights) < 1e-5
    assert found.residual == expected.residual


def test_what_a_run_went_back_from_is_forgotten(folder, tmp_path):
    """Step 4 is bad and leads back to the checkpoint of step 2: what step 3 kept has not been."""
    config = config_of(
        tmp_path / "config.yaml",
        folder / "moons",
        training__steps=6,
        training__save_every=2,
        training__non_finite="rollback",
        ema__snapshot_every=1,
    )
    train(config, tmp_path / "run", before=functools.partial(plant, 3 * 32 + 5)).succeeded()
    kept = {
        place.name: json.loads((place / "state.json").read_text())["ema_updates"]
        for place in (tmp_path / "run" / "ema").iterdir()
    }
    assert kept == {f"step-0000000{step}": n for step, n in ((1, 1), (2, 2), (4, 2), (5, 3), (6, 4))}
    assert all(value.isfinite().all() for value in mean_of_width(tmp_path / "run", 0.07).weights.values())


def plant(position):
    """Make one sample at a position of the stream what no loader would hand out."""
    from driftmap.trainer.latents import Preparation

    prepare = Preparation.__call__

    def poisoned(self, samples):
        batch = prepare(self, samples)
        batch.data[samples["index"] == position] = torch.nan
        return batch

    Preparation.__call__ = poisoned


# Mistakes


def test_one_width_is_enough_and_rough(folder, tmp_path):
    train(folder / "run.yaml", tmp_path / "run", "ema.power_widths=[0.1]").succeeded()
    out = tmp_path / "mean.safetensors"
    command = ema(tmp_path / "run", out).succeeded()
    assert command.stderr.count("warning: ") == 1 and "one width only (0.1)" in command.stderr
    expected = Pieces(folder / "truth" / "ema" / f"step-{STEPS:08d}", TRUTH).all()
    kept = Pieces(tmp_path / "run" / "ema" / f"step-{STEPS:08d}", "ema-power-0.1").all()
    assert distance(load_file(out), expected) < distance(kept, expected)


def test_a_damaged_snapshot_is_left_out_loudly(copy, folder, tmp_path):
    file = copy / "ema" / "step-00000030" / "ema-power-0.05-00001-of-00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    out = tmp_path / "mean.safetensors"
    command = ema(copy, out).succeeded()
    assert command.stderr.count("warning: ") == 1 and str(file) in command.stderr
    assert "the sum of 14 means" in command.stdout
    message = ema(copy, tmp_path / "other.safetensors", "--step", 30).refused()
    assert str(file) in message and not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("width", [0, 0.28, -1, 5])
def test_a_width_that_is_none_is_refused(width, folder, tmp_path):
    message = ema(folder / "run", tmp_path / "mean.safetensors", width=width).refused()
    assert "between 0 and 0.28" in message and "0.05 to 0.15 are usual" in message


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(folder, tmp_path):
    message = ema(folder / "run", tmp_path / "mean.safetensors", "--step", 7).refused()
    assert "no snapshot of step 7" in message and "5, 10, 15, 20, 25, 30, 35, 40" in message


def test_a_run_without_snapshots_is_told_how_to_have_some(copy, tmp_path):
    shutil.rmtree(copy / "ema")
    message = ema(copy, tmp_path / "mean.safetensors").refused()
    assert "holds no snapshots" in message
    assert "ema.power_widths" in message and "ema.snapshot_every" in message


def test_snapshots_of_nothing_are_refused(folder, tmp_path):
    message = train(folder / "run.yaml", tmp_path / "run", "ema.power_widths=[]").refused()
    assert "ema.snapshot_every: 5 has no effect without power means" in message
    assert not (tmp_path / "run").exists()
