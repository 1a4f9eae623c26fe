"""Any strategy on any number of processes trains what one trains, and goes on where another stopped."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardWriter, index_shards
from driftmap.trainer.checkpoint import newest
from runs import driftmap, launched, read_losses, write_config

SHARDED = ("fsdp", "zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *SHARDED)
OBJECTIVES = {
    "flow": {"name": "flow_matching"},
    "semigroup": {"name": "semigroup"},
    "residual": {"name": "lagrangian"},
    "semigradient": {"name": "lagrangian", "gradient": "semigradient", "weighting": {"name": "learned"}},
    "eulerian": {"name": "eulerian"},
    "eulerian residual": {"name": "eulerian", "gradient": "residual"},
}
MODEL = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 24, "depth": 2, "num_heads": 2}
STEPS = 20
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with shards of small random latents in two classes."""
    folder = tmp_path_factory.mktemp("strategies")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "latents") as writer:
        for number in range(60):
            mean, std = generator.standard_normal((2, 4, 4)) + number % 2, np.full((2, 4, 4), 0.1)
            moments = np.stack([mean, std]).astype(np.float32)
            writer.write(
                f"{number:03d}", {"moments.npy": npy_bytes(moments), "cls": str(number % 2).encode()}
            )
    index_shards(folder / "latents")
    return folder


def config_of(folder, objective, **changes):
    settings = {
        "data__batch_size": 12,
        "model": {**MODEL, "num_classes": 2},
        "objective": OBJECTIVES[objective],
        "optimizer": {
            "lr": 1e-3,
            "weight_decay": 0.1,
            "clip_norm": 0.5,
            "warmup_steps": 3,
            "decay": "cosine",
        },
        "training": {"steps": STEPS, "save_every": 10, "keep": 9, "log_every": 1},
    }
    return write_config(folder / f"{objective}.yaml", folder / "latents", **settings, **changes)


@pytest.fixture(scope="module")
def alone(folder):
    """Return a function: what one process logs and saves for an objective."""

    @functools.cache
    def train(objective):
        config, run = config_of(folder, objective), folder / f"alone-{objective}"
        driftmap("train", config, "--out", run, logs=folder / f"{run.name}.logs").succeeded()
        return run

    return train


def note(file, rank):
    """Let a process write what it holds at the end.

    All weights, gathered as its forward pass would, and the mean of all weights, made beside the run from
    fragments that are gathered after every step.
    """
    from driftmap.trainer import build

    build_run, train = build.build, build.train
    whole = {}

    def build_and_watch(recipe, folder):
        run = build_run(recipe, folder)
        update, n = run.ema.update, run.ema.num_updates
        mean = {name: value.clone() for name, value in joined_fragments(run).items()}

        def watched():
            nonlocal n
            update()
            keep = min(recipe.ema.decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(list(mean.values()), list(joined_fragments(run).values()), 1 - keep)
            n += 1

        run.ema.update = watched
        whole.update(mean)
        return run

    def train_and_note(recipe, folder):
        run = train(recipe, folder)
        means = {f"ema/{name}": value for name, value in whole.items()}
        save_file({**whole_weights(run.model), **means}, file.with_name(f"{file.name}-{rank}.safetensors"))
        return run

    build.build, build.train = build_and_watch, train_and_note


def joined_fragments(run):
    """Return the whole fp32 master copy, made of the fragments of all processes."""
    own = [(f.name, f.shape, f.start, f.value.clone()) for f in run.strategy.fragments if f.writes]
    whole = {}
    for parts in run.strategy.world.gathered(own):
        for name, shape, start, value in parts:
            flat = whole.setdefault(name, torch.full(shape, torch.nan)).view(-1)
            flat[start : start + value.numel()] = value.reshape(-1)
    return dict(sorted(whole.items()))


def whole_weights(model):
    from deepspeed import zero
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name] = whole.detach().clone()
    return found


def assert_same_losses(run, other, *, steps=range(1, STEPS + 1)):
    ours, theirs = read_losses(run), read_losses(other)
    for step in steps:
        for name, value in theirs[step].items():
            assert ours[step][name] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), (step, name)


CASES = [(strategy, objective) for strategy in STRATEGIES for objective in OBJECTIVES]
CASES.remove(("zero3", "residual"))
# Its derivative is in the state as well; what it adds to the others is seen where parameters are sharded.
CASES = [case for case in CASES if "eulerian" not in case[1]]
CASES += [("fsdp", "eulerian"), ("zero3", "eulerian"), ("fsdp", "eulerian residual")]


@pytest.fixture(scope="module")
def on_two(folder):
    """Return a function: the run of two processes under a strategy; they note what they hold."""

    @functools.cache
    def train(strategy, objective):
        config, run = config_of(folder, objective), folder / f"{strategy}-{objective}"
        words = ("train", config, f"strategy.name={strategy}", "--out", run)
        for command in launched(2, *words, logs=run, before=functools.partial(note, run)):
            command.succeeded()
        return run

    return train


@pytest.mark.parametrize(("strategy", "objective"), CASES)
def test_two_processes_are_one(strategy, objective, on_two, alone):
    run = on_two(strategy, objective)
    assert_same_losses(run, alone(objective))
    held = [load_file(f"{run}-{rank}.safetensors") for rank in range(2)]
    saved, theirs = newest(run).weights("model"), newest(alone(objective)).weights("model")
    for name in [name for name in held[0] if not name.startswith("ema/")]:
        assert torch.equal(held[0][name], held[1][name]) and torch.equal(held[0][name], saved[name])
        value, other = saved[name], theirs[name]
        if name.endswith("qkv.bias"):
            # Attention does not see the bias of the keys: its gradient is rounding, whose sign Adam obeys.
            value, other = (torch.cat([x[:24], x[48:]]) for x in (value, other))
        assert (value - other).norm() <= TOLERANCE * other.norm().clamp_min(1e-2), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_mean_is_that_of_the_whole_master_copy(strategy, on_two):
    """Each process averages its own fragments; joined, they are the mean of all weights to the last bit."""
    run = on_two(strategy, "flow")
    saved = newest(run).weights("ema")
    for rank in range(2):
        held = load_file(f"{run}-{rank}.safetensors")
        assert all(torch.equal(held[f"ema/{name}"], value) for name, value in saved.items())
    weights = newest(run).weights("model")
    assert any(not torch.equal(weights[name], value) for name, value in saved.items())


SETTINGS = {
    "accumulation": (2, ["strategy.name=ddp", "training.accumulation=3"]),
    "accumulation, sharded": (2, ["strategy.name=fsdp", "training.accumulation=2"]),
    "accumulation, zero 2": (2, ["strategy.name=zero2", "training.accumulation=3"]),
    "accumulation, zero 3": (2, ["strategy.name=zero3", "training.accumulation=2"]),
    "groups of two": (4, ["strategy={name: fsdp, shard_size: 2}"]),
    "groups of one": (2, ["strategy={name: fsdp, shard_size: 1}"]),
    "offloaded": (2, ["strategy={name: fsdp, offload: true}"]),
    "offloaded, zero 2": (2, ["strategy={name: zero2, offload: true}"]),
    "offloaded, zero 3": (2, ["strategy={name: zero3, offload: true}"]),
    "recomputed": (2, ["strategy.name=ddp", "training.recompute_every=1"]),
    "recomputed, sharded": (2, ["strategy.name=fsdp", "training.recompute_every=1"]),
    "recomputed, zero 3": (2, ["strategy.name=zero3", "training.recompute_every=2"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_no_result(name, folder, alone):
    number, overrides = SETTINGS[name]
    run = folder / name.replace(", ", "-").replace(" ", "-")
    words = ("train", config_of(folder, "flow"), *overrides, "--out", run)
    for command in launched(number, *words, logs=run):
        command.succeeded()
    assert_same_losses(run, alone("flow"))


HALF = [("ddp", "bf16"), ("fsdp", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("fsdp", "fp16")]


@pytest.mark.parametrize(("strategy", "precision"), HALF)
def test_half_precision_is_near_single_precision(strategy, precision, folder, alone):
    """Near, but not the same; and what is saved is fp32."""
    run = folder / f"{strategy}-{precision}"
    overrides = (f"strategy.name={strategy}", f"training.precision={precision}")
    words = ("train", config_of(folder, "flow"), *overrides, "--out", run)
    for command in launched(2, *words, logs=run):
        command.succeeded()
    ours, theirs = read_losses(run), read_losses(alone("flow"))
    assert [ours[step]["loss"] for step in ours] == pytest.approx(
        [theirs[step]["loss"] for step in theirs], rel=3e-2
    )
    assert ours != theirs
    assert {value.dtype for value in newest(run).weights("model").values()} == {torch.float32}


@pytest.mark.parametrize(("strategy", "shard"), [("ddp", False), ("fsdp", True), ("zero3", False)])
def test_a_teacher_teaches_the_same_whole_or_sharded(strategy, shard, folder, alone):
    teacher = f"teacher={{run: {alone('flow')}, shard: {str(shard).lower()}, guidance: 2}}"
    config, one = config_of(folder, "semigradient"), folder / "taught-alone"
    if not one.exists():
        words = ("train", config, teacher.replace("true", "false"), "--out", one)
        driftmap(*words, logs=folder / "taught-alone.logs").succeeded()
    run = folder / f"taught-{strategy}"
    words = ("train", config, teacher, f"strategy.name={strategy}", "--out", run)
    for command in launched(2, *words, logs=run):
        command.succeeded()
    assert_same_losses(run, one)
    assert read_losses(one)[1] != read_losses(alone("semigradient"))[1]


def evaluate_the_mean(file, rank):
    """Let a process write a batch's losses with its weights, with their mean, and with its weights again."""
    from driftmap.data.batch import Batches, Stream
    from driftmap.trainer import build

    train = build.train

    def train_and_evaluate(recipe, folder):
        run = train(recipe, folder)
        with Batches(run.shards, Stream(12, seed=5)) as batches:
            samples = next(batches)
        losses = [loss_of(run, samples)]
        with run.ema.swapped_in(refresh=run.strategy.refresh):
            losses.append(loss_of(run, samples))
        losses.append(loss_of(run, samples))
        file.with_name(f"{file.name}-{rank}.json").write_text(json.dumps(losses))
        return run

    build.train = train_and_evaluate


def loss_of(run, samples):
    with torch.no_grad():
        return run.strategy.task(samples)["loss"].item()


def test_the_mean_is_swapped_in_for_an_evaluation_and_out_again(folder):
    config, losses = config_of(folder, "flow"), {}
    for number, strategy in [(1, "ddp"), *((2, strategy) for strategy in STRATEGIES)]:
        run = folder / f"swapped-{number}-{strategy}"
        words = ("train", config, f"strategy.name={strategy}", "training.steps=4", "--out", run)
        for command in launched(number, *words, logs=run, before=functools.partial(evaluate_the_mean, run)):
            command.succeeded()
        for rank in range(number):
            losses[strategy, rank, number] = json.loads(run.with_name(f"{run.name}-{rank}.json").read_text())
    live, mean, again = expected = losses["ddp", 0, 1]
    assert live == again and abs(live - mean) > 1e-3 * live
    for found in losses.values():
        assert found == pytest.approx(expected, rel=TOLERANCE) and found[0] == found[2]


# Going on, on another number of processes and under another strategy

SAME = [(strategy, strategy, number) for strategy in STRATEGIES for number in (1, 2, 3)]
ACROSS = [("ddp", other, number) for other, number in zip(SHARDED, (3, 1, 2, 3), strict=True)]
ACROSS += [(other, "ddp", number) for other, number in zip(SHARDED, (1, 3, 2, 1), strict=True)]
ACROSS += [("fsdp", "zero3", 2), ("zero3", "fsdp", 3), ("fsdp", "zero1", 1), ("zero2", "fsdp", 2)]
ACROSS += [("zero1", "zero3", 3), ("zero3", "zero2", 2)]


@pytest.mark.parametrize(("saved_by", "strategy", "number"), SAME + ACROSS)
def test_any_strategy_goes_on_from_any_other(saved_by, strategy, number, on_two, alone, folder):
    run = folder / f"{saved_by}-{strategy}-{number}"
    shutil.copytree(on_two(saved_by, "flow"), run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "log.jsonl").unlink()
    words = ("train", folder / "flow.yaml", f"strategy.name={strategy}", "--out", run)
    for command in launched(number, *words, logs=run):
        command.succeeded()
    half = STEPS // 2
    assert list(read_losses(run)) == list(range(half + 1, STEPS + 1))
    assert_same_losses(run, alone("flow"), steps=range(half + 1, STEPS + 1))
    for kind in ("ema", "optimizer"):
        ours, theirs = newest(run).weights(kind), newest(alone("flow")).weights(kind)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.endswith("qkv.bias"):
                assert (ours[name] - value).norm() <= 10 * TOLERANCE * value.norm().clamp_min(1e-4), name


# The comparison sees what it is for


def call_the_inner_module(rank):
    """Let gradients stay unsynchronised, as whoever calls `.module` does."""
    from driftmap.trainer import build

    build_run = build.build

    def build_unsynchronised(recipe, folder):
        run = build_run(recipe, folder)
        run.strategy.task = run.strategy.task.module
        return run

    build.build = build_unsynchronised


def test_without_synchronisation_two_processes_are_not_one(folder, alone):
    run = folder / "unsynchronised"
    words = ("train", config_of(folder, "flow"), "--out", run)
    for command in launched(2, *words, logs=run, before=call_the_inner_module):
        command.succeeded()
    with pytest.raises(AssertionError):
        assert_same_losses(run, alone("flow"))
