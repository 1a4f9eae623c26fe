"""A number that is no number changes no weights, on no process, and the sample that made it is named."""

import functools
import json
import time

import pytest
import torch

from driftmap.data.synthetic import write_points
from driftmap.trainer.checkpoint import newest
from runs import checkpoints, driftmap, launched, read_losses, write_config

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
POSITION = 3 * 32 + 5  # in the stream: a sample of step 4, and of the second of two processes


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return write_points(tmp_path_factory.mktemp("points") / "moons", "moons", n=100, seed=0).folder


def plant(position, rank=0, *, value=torch.nan):
    """Make one sample at a position of the stream what no loader would hand out."""
    from driftmap.trainer.latents import Preparation

    prepare = Preparation.__call__

    def poisoned(self, samples):
        batch = prepare(self, samples)
        batch.data[samples["index"] == position] = value
        return batch

    Preparation.__call__ = poisoned


def incidents(run):
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def key_at(run, position):
    """Return the key of the sample at a position of the stream of a run."""
    from driftmap.data.batch import Batches, Stream
    from driftmap.data.shards import ShardSet
    from driftmap.trainer.build import run_recipe

    shards = ShardSet.open(run_recipe(run)["data"]["shards"])
    with Batches(shards, Stream(32, seed=0)) as batches:
        return batches.keys_of(torch.tensor([position]))[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip_goes_on_and_names_the_sample(strategy, points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__non_finite="skip")
    run = tmp_path / "run"
    words = ("train", config, f"strategy.name={strategy}", "--out", run)
    first, second = launched(2, *words, logs=run, before=functools.partial(plant, POSITION))
    assert first.succeeded().stderr.count("not finite") == 1 and "not finite" not in second.succeeded().stderr
    (incident,) = incidents(run)
    assert (incident["step"], incident["action"]) == (4, "skip")
    (sample,) = incident["samples"]
    assert sample["position"] == POSITION and sample["rank"] == 1 and 0 <= sample["time"] <= 1
    assert sample["key"] == key_at(run, POSITION) and sample["key"] in first.stderr
    assert all(float(norm) > 0 for norm in incident["weight_norms"].values())
    assert list(read_losses(run)) == [1, 2, 3, 4, 5, 6]
    state = newest(run).state
    assert (state["step"], state["optimizer_updates"], state["ema_updates"]) == (6, 5, 5)
    for kind in ("model", "ema", "optimizer"):
        assert all(torch.isfinite(value).all() for value in newest(run).weights(kind).values())


def test_a_skipped_step_is_as_if_its_gradient_had_been_thrown_away(points, tmp_path):
    """Weights after the bad step are bitwise those before it, and the next step is from there."""
    config = write_config(
        tmp_path / "config.yaml",
        points,
        training__non_finite="skip",
        training__save_every=1,
        training__keep=9,
    )
    run = tmp_path / "run"
    poison = functools.partial(plant, POSITION)
    driftmap("train", config, "--out", run, logs=tmp_path / "run.logs", before=poison).succeeded()
    found = checkpoints(run)
    tensors = [name for name in found["step-00000003"] if name.endswith(".safetensors")]
    assert all(found["step-00000003"][name] == found["step-00000004"][name] for name in tensors)
    assert all(found["step-00000004"][name] != found["step-00000005"][name] for name in tensors)


def test_rollback_returns_to_the_last_good_checkpoint(points, tmp_path):
    """The run saves at 2 and 4; step 4 is bad, so at 4 it holds again what it saved at 2."""
    config = write_config(tmp_path / "config.yaml", points, training__non_finite="rollback", training__keep=9)
    run = tmp_path / "run"
    words = ("train", config, "--out", run)
    first, second = launched(2, *words, logs=run, before=functools.partial(plant, POSITION))
    assert "went back to step-00000002" in first.succeeded().stderr
    second.succeeded()
    found = checkpoints(run)
    tensors = [name for name in found["step-00000002"] if name.endswith(".safetensors")]
    assert len(tensors) == 6
    assert all(found["step-00000002"][name] == found["step-00000004"][name] for name in tensors)
    assert all(found["step-00000004"][name] != found["step-00000006"][name] for name in tensors)
    state = newest(run).state
    assert (state["step"], state["samples"], state["optimizer_updates"]) == (6, 6 * 32, 4)


def test_rollback_without_a_checkpoint_says_so(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__non_finite="rollback")
    poison = functools.partial(plant, 5)
    words = ("train", config, "--out", tmp_path / "run")
    message = driftmap(*words, logs=tmp_path / "run.logs", before=poison).refused()
    assert "no checkpoint yet to go back to" in message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_raise_stops_all_processes_within_ten_seconds(strategy, points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points)
    run = tmp_path / "run"
    words = ("train", config, f"strategy.name={strategy}", "--out", run)
    commands = launched(2, *words, logs=run, before=functools.partial(plant, POSITION))
    messages = [command.refused() for command in commands]
    written = (run / "incidents.jsonl").stat().st_mtime
    assert time.time() - written < 10
    assert messages[0] == messages[1]
    assert "step 4 is not finite" in messages[0] and key_at(run, POSITION) in messages[0]
    assert list(checkpoints(run)) == ["step-00000002"]


def test_a_run_that_is_never_finite_is_not_skipped_for_ever(points, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", points, training__non_finite="skip", training__steps=100, training__keep=1
    )
    # What overflows is the gradient of every step, so no sample stands out.
    config_text = config.read_text().replace("lr: 0.01", "lr: 1.0e+30")
    config.write_text(config_text)
    command = driftmap("train", config, "--out", tmp_path / "run", logs=tmp_path / "run.logs")
    assert command.ended() == 2 and command.stderr.count("warning: ") == 10
    assert "the 11th step in a row" in command.stderr


def jump(step, rank=0):
    """Let the loss of all samples from a step on be a hundred times as large."""
    from driftmap.trainer import loop

    forward = loop.Task.forward

    def larger(self, samples):
        losses = forward(self, samples)
        grow = 100.0 if int(samples["index"][0]) >= 32 * step else 1.0
        return {**losses, "loss": losses["loss"] * grow}

    loop.Task.forward = larger


def test_a_jump_of_the_loss_is_told_once(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__steps=20, training__save_every=20)
    run = tmp_path / "run"
    words = ("train", config, "--out", run)
    command = driftmap(*words, logs=tmp_path / "run.logs", before=functools.partial(jump, 14)).succeeded()
    assert "the loss jumped" in command.stderr
    found = incidents(run)
    assert {incident["kind"] for incident in found} == {"spike"}
    assert found[0]["step"] in (15, 16) and found[0]["loss"] > 10 * found[0]["usual_loss"]
    driftmap("train", config, "--out", tmp_path / "calm", logs=tmp_path / "calm.logs").succeeded()
    assert not (tmp_path / "calm" / "incidents.jsonl").exists()


def test_in_fp16_a_loss_that_is_scaled_too_much_is_scaled_less(points, tmp_path):
    """A first scale of 2^40 overflows some twenty times; these steps are no incidents, and the run learns."""
    config = write_config(
        tmp_path / "config.yaml",
        points,
        training__precision="fp16",
        training__steps=60,
        optimizer={"lr": 3e-3},
    )
    run = tmp_path / "run"
    words = ("train", config, "--out", run)
    driftmap(*words, logs=tmp_path / "run.logs", before=scale_far_too_much).succeeded()
    state = newest(run).state
    assert 2**10 < state["loss_scale"] < 2**30 and not (run / "incidents.jsonl").exists()
    assert 30 < state["optimizer_updates"] == state["ema_updates"] < 60
    losses = [value["loss"] for value in read_losses(run).values()]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])


def scale_far_too_much():
    from driftmap.trainer import strategy

    strategy.FP16_SCALE = 2.0**40
