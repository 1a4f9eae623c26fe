"""A run that was stopped is the run that was not: bitwise, wherever and however it was stopped."""

import functools
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from driftmap.data.members import npy_bytes
from driftmap.data.shards import index_shards, write_shard
from driftmap.data.synthetic import SETS, write_points
from runs import checkpoints, driftmap, read_losses, wait_until, write_config


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return write_points(tmp_path_factory.mktemp("points") / "moons", "moons", n=100, seed=0).folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    points = enumerate(SETS["rings"](100, 0))
    samples = ((f"{n:03d}", {"points.npy": npy_bytes(x), "cls": str(n % 3).encode()}) for n, x in points)
    write_shard(folder / "rings.tar", samples)
    return index_shards(folder).folder


def train(config, run, *overrides, **disturbance):
    return driftmap(
        "train", config, *overrides, "--out", run, logs=run.parent / f"{run.name}.logs", **disturbance
    )


def assert_same_run(run, other):
    assert checkpoints(run) == checkpoints(other)
    assert read_losses(run) == read_losses(other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__accumulation": 2},
        {"model__num_classes": 3, "objective__condition_dropout": 0.5, "data__window": 1},
    ],
    ids=["plain", "accumulation", "dropout"],
)
def test_three_steps_and_three_steps_are_six(changes, points, classes, tmp_path):
    shards = classes if "model__num_classes" in changes else points
    config = write_config(tmp_path / "config.yaml", shards, training__save_every=3, **changes)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, whole).succeeded()
    train(config, halves, "training.steps=3").succeeded()
    assert list(checkpoints(halves)) == ["step-00000003"]
    train(config, halves).succeeded()
    assert list(checkpoints(halves)) == ["step-00000003", "step-00000006"]
    assert_same_run(halves, whole)


def test_a_resumed_run_differs_where_its_past_differs(points, tmp_path):
    """The comparison sees a change of the learning rate by 1e-4."""
    runs = []
    for lr in ("1e-2", "1.0001e-2"):
        config = write_config(tmp_path / f"{lr}.yaml", points)
        runs.append(tmp_path / lr)
        train(config, runs[-1], f"optimizer.lr={lr}").succeeded()
    assert checkpoints(runs[0]).keys() == checkpoints(runs[1]).keys()
    for files, others in zip(*(checkpoints(run).values() for run in runs), strict=True):
        changed = {name for name in files if files[name] != others[name]}
        assert changed == {f"{kind}-00001-of-00001.safetensors" for kind in ("model", "ema", "optimizer")}


def test_accumulation_does_not_change_losses(points, tmp_path):
    losses = []
    for accumulation in (1, 2, 4):
        run = tmp_path / str(accumulation)
        config = write_config(tmp_path / f"{accumulation}.yaml", points, training__accumulation=accumulation)
        train(config, run).succeeded()
        losses.append([values["loss"] for values in read_losses(run).values()])
    assert len(losses[0]) == 6 and losses[0][0] != losses[0][5]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


# Kills


def kill_at(number, *, events, named):
    """Send this process SIGKILL at the n-th of the audited calls `events` that name a path with `named`."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in events and arguments and named in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_run_killed_steps_after_its_checkpoint(points, tmp_path):
    settings = {"save_every": 4, "steps": 9, "log_every": 1, "save_in_background": False}
    config = write_config(tmp_path / "config.yaml", points, training=settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole).succeeded()
    # The log is opened for its first line at step 1, so the eighth time is step 8 with a checkpoint due.
    kill = functools.partial(kill_at, 8, events=("open",), named="log.jsonl")
    assert train(config, killed, before=kill).ended() == -signal.SIGKILL
    assert list(checkpoints(killed)) == ["step-00000004"]
    assert len(read_losses(killed)) == 7
    train(config, killed).succeeded()
    assert_same_run(killed, whole)


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def in_second_save(act):
    """Call `act(its name)` before every call that changes files, from the second save to the third."""
    armed = False

    def hook(event, arguments):
        nonlocal armed
        if event == "os.mkdir":
            armed = str(arguments[0]).endswith("step-00000004.tmp")
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if armed and event in CHANGES and not reads:
            armed = False  # not for what `act` does itself
            act(f"{event} {arguments[0]}")
            armed = True

    sys.addaudithook(hook)


def list_calls(file):
    def write(call):
        with file.open("a") as stream:
            stream.write(call + "\n")

    in_second_save(write)


def kill_before_call(number):
    remaining = iter(range(number, -1, -1))
    in_second_save(lambda call: next(remaining) or os.kill(os.getpid(), signal.SIGKILL))


def kill_in_file(number):
    """Send this process SIGKILL when half of the n-th file of tensors is written."""
    from driftmap.trainer import pieces

    save_file = pieces.save_file
    remaining = iter(range(number, -1, -1))

    def half_of_it(tensors, file, metadata):
        save_file(tensors, file, metadata)
        if not next(remaining):
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    pieces.save_file = half_of_it


def test_a_kill_at_any_point_of_a_save(points, tmp_path):
    settings = {"training__keep": 1, "training__save_in_background": False}
    config = write_config(tmp_path / "config.yaml", points, **settings)
    whole = tmp_path / "whole"
    train(config, whole, before=functools.partial(list_calls, tmp_path / "calls")).succeeded()
    calls = (tmp_path / "calls").read_text().splitlines()
    renames = [number for number, call in enumerate(calls) if call.startswith("os.rename")]
    assert len(renames) == 2 and any(call.startswith("os.remove") for call in calls)

    def killed_and_gone_on(kill):
        run = tmp_path / f"{kill.func.__name__}-{kill.args[0]}"
        assert train(config, run, before=kill).ended() == -signal.SIGKILL
        found = sorted(folder.name for folder in (run / "checkpoints").iterdir() if "." not in folder.name)
        last = train(config, run).succeeded()
        assert "damaged" not in last.stderr
        assert list(checkpoints(run)) == ["step-00000006"], "leftovers"
        assert_same_run(run, whole)
        return found

    kills = [functools.partial(kill_in_file, 3 + number) for number in range(3)]
    kills += [functools.partial(kill_before_call, number) for number in range(len(calls))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(killed_and_gone_on, kills))
    first, second = ["step-00000002"], ["step-00000004"]
    assert found[:3] == [first] * 3
    # Before the first rename there is the old one, between both there are two, then there is the new one.
    before, between = renames[0] + 1, renames[1] - renames[0]
    assert found[3:] == [first] * before + [first + second] * between + [second] * (
        len(calls) - renames[1] - 1
    )


# Signals


def last_logged(run):
    return max(read_losses(run), default=0) if (run / "log.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_save_and_the_same_command_goes_on(number, points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points, training__save_every=10**6, training__log_every=5)
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = train(config, run, "training.steps=1000000")
    wait_until(lambda: last_logged(run) >= 5)
    os.kill(command.process.pid, number)
    assert command.ended() == 130
    (saved,) = checkpoints(run)
    step = last_logged(run)
    assert saved == f"step-{step:08d}"
    assert f"saved at step {step}" in " ".join(command.stdout.split())
    train(config, run, f"training.steps={step + 7}").succeeded()
    train(config, whole, f"training.steps={step + 7}").succeeded()
    assert checkpoints(run)[f"step-{step + 7:08d}"] == checkpoints(whole)[f"step-{step + 7:08d}"]


def test_every_sample_is_in_the_log_of_a_stopped_run_once(points, tmp_path):
    """A stop ends a line early and the next one covers the rest: the weighted mean stays."""
    config = write_config(tmp_path / "config.yaml", points, training__log_every=4, training__save_every=100)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, run, "training.steps=3").succeeded()
    train(config, run, "training.steps=8").succeeded()
    train(config, whole, "training.steps=8").succeeded()
    stopped, straight = read_losses(run), read_losses(whole)
    assert list(stopped) == [3, 4, 8] and list(straight) == [4, 8]
    assert stopped[8] == straight[8]
    assert (3 * stopped[3]["loss"] + stopped[4]["loss"]) / 4 == pytest.approx(straight[4]["loss"], rel=1e-6)


def test_a_second_interrupt_ends_at_once(points, tmp_path):
    # One step of ten thousand micro steps takes many seconds.
    config = write_config(
        tmp_path / "config.yaml", points, data__batch_size=80_000, training__accumulation=10_000
    )
    run = tmp_path / "run"
    command = train(config, run)
    wait_until(lambda: list(run.glob("tensorboard/*")))
    os.kill(command.process.pid, signal.SIGINT)
    command.process.join(0.5)
    assert command.process.is_alive(), "the first interrupt waits for the end of the step"
    for _ in range(5):  # Python drops an interrupt that falls into a destructor; a person presses again
        if command.process.is_alive():
            os.kill(command.process.pid, signal.SIGINT)
            command.process.join(1.5)
    assert command.ended() == 130
    assert last_logged(run) == 0 and not (run / "checkpoints").exists()


def train_in_a_thread(config, run):
    """Train outside the main thread, where Python installs no signal handlers."""
    import threading

    from driftmap.trainer.build import train
    from driftmap.trainer.config import read_config
    from driftmap.trainer.recipe import recipe_from

    thread = threading.Thread(target=train, args=(recipe_from(read_config(config)), run))
    thread.start()
    thread.join()


def test_a_run_in_a_thread_trains_without_signal_handlers(points, tmp_path):
    config = write_config(tmp_path / "config.yaml", points)
    threaded, whole = tmp_path / "threaded", tmp_path / "whole"
    command = train(config, threaded, before=functools.partial(train_in_a_thread, config, threaded))
    # Where the thread failed, the command itself would train; the thread's traceback would tell.
    assert command.succeeded().stderr == ""
    train(config, whole).succeeded()
    assert_same_run(threaded, whole)
