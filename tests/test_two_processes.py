"""Two processes train what one trains: the same losses and parameters, bitwise the same on both."""

import functools
import resource

import pytest
import torch
from safetensors.torch import load_file

from driftmap.data.synthetic import write_points
from driftmap.trainer.pieces import Pieces
from runs import driftmap, launched, read_losses, tree, write_config

STEP = "step-00000004"


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return write_points(tmp_path_factory.mktemp("points") / "moons", "moons", n=100, seed=0).folder


def on_two(config, run, *overrides, disturb=None):
    """Start a command in two processes, which note what they hold; `disturb` is for the first one."""
    before = functools.partial(note_weights, run, disturb)
    return launched(2, "train", config, *overrides, "--out", run, logs=run, before=before)


def note_weights(run_folder, disturb, rank):
    """Let this process write the weights that it holds itself when its run has ended."""
    from safetensors.torch import save_file

    from driftmap.trainer import build

    train = build.train

    def train_and_note(recipe, folder):
        run = train(recipe, folder)
        means = {f"ema/{number}": mean for number, mean in enumerate(run.ema.means["ema"])}
        file = run_folder.with_name(f"{run_folder.name}-{rank}.safetensors")
        save_file({**run.model.state_dict(), **means}, file)
        return run

    build.train = train_and_note
    if disturb is not None and rank == 0:
        disturb()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(accumulation, points, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", points, training__steps=4, training__accumulation=accumulation
    )
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = (command.succeeded() for command in on_two(config, two))
    assert "step 4 of 4" in first.stdout and second.stdout == "", "one process tells for all"
    driftmap("train", config, "--out", one, logs=tmp_path / "one.logs").succeeded()
    held = [load_file(tmp_path / f"two-{rank}.safetensors") for rank in "01"]
    saved = Pieces(two / "checkpoints" / STEP, "model").all()
    alone = Pieces(one / "checkpoints" / STEP, "model").all()
    assert held[0].keys() == held[1].keys() and len(saved) > 5
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    for name, value in saved.items():
        assert torch.equal(held[0][name], value)
        assert (value - alone[name]).abs().max() <= 1e-5
    # The logged means are over both processes: one alone has seen other samples.
    assert read_losses(one).keys() == read_losses(two).keys() == {1, 2, 3, 4}
    for step, values in read_losses(one).items():
        assert read_losses(two)[step] == pytest.approx(values, abs=1e-5, rel=1e-5)
    assert len((two / "log.jsonl").read_text().splitlines()) == 4
    assert len(list((two / "tensorboard").iterdir())) == 1


def test_a_run_of_two_goes_on_in_one_and_back(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__steps=6)
    mixed, one = tmp_path / "mixed", tmp_path / "one"
    for command in on_two(config, mixed, "training.steps=2"):
        command.succeeded()
    driftmap("train", config, "training.steps=4", "--out", mixed, logs=tmp_path / "mixed.logs").succeeded()
    for command in on_two(config, mixed):
        command.succeeded()
    driftmap("train", config, "--out", one, logs=tmp_path / "one.logs").succeeded()
    ends = [Pieces(run / "checkpoints" / "step-00000006", "ema").all() for run in (mixed, one)]
    assert all((ends[0][name] - ends[1][name]).abs().max() <= 1e-5 for name in ends[1])
    losses = [[values["loss"] for values in read_losses(run).values()] for run in (mixed, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))


def test_where_one_process_cannot_save_no_other_waits(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points)
    run = tmp_path / "run"
    messages = [command.refused() for command in on_two(config, run, disturb=limit_files)]
    assert messages[0] == messages[1]
    assert "cannot save" in messages[0] and "step-00000002" in messages[0]
    assert list((run / "checkpoints").iterdir()) == []


def test_another_recipe_is_refused_by_both(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__steps=2)
    run = tmp_path / "run"
    driftmap("train", config, "--out", run, logs=tmp_path / "run.logs").succeeded()
    before = tree(run)
    messages = [command.refused() for command in on_two(config, run, "seed=1")]
    assert messages[0] == messages[1] and "seed is 0 there, 1 here" in messages[0]
    assert tree(run) == before


def test_processes_that_cannot_share_a_batch_are_refused(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, data__batch_size=31)
    for command in on_two(config, tmp_path / "run"):
        assert "31 over 2 ranks" in command.refused()
