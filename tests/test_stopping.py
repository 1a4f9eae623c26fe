"""Asked to stop amid any work, two processes stop together and keep what is done; the same command goes on.

The signal comes to one process only, at a moment that the test chooses; what comes out in the end is what
comes out without a stop, and no batch was done twice.
"""

import functools
import json
import os
import signal
import time

import pytest
from test_evaluate_processes import scene, table, words  # noqa: F401 - scene is a fixture

from driftmap.data.synthetic import write_points
from driftmap.trainer.signals import BEFORE_THE_END_S, ExitCode
from runs import checkpoints, driftmap, launched, read_losses, tree, write_config

NEVER = 10**9
PLACES = {  # what is called once a batch
    "evaluate": "driftmap.trainer.evaluate._sample",
    "validation": "driftmap.trainer.validation.Validation._batch",
    "likelihood": "driftmap.launch.likelihood.measure",
    "trajectories": "driftmap.trainer.trajectories._Solver.encode",
}


def note(place, file, rank, *, kill=NEVER, number=signal.SIGTERM):
    """Count the calls of a function in a file; in the n-th of process 1 a signal comes to it."""
    from pkgutil import resolve_name

    owner, name = place.rsplit(".", 1)
    owner = resolve_name(owner)
    called = getattr(owner, name)

    def counted(*arguments, **settings):
        with file.with_name(f"{file.name}-{rank}").open("a") as stream:
            stream.write(".")
        if rank == 1 and file.with_name(f"{file.name}-{rank}").stat().st_size == kill:
            os.kill(os.getpid(), number)
        return called(*arguments, **settings)

    setattr(owner, name, counted)


def batches(*files):
    """Return how often the noted function was called, by any process."""
    return sum(found.stat().st_size for file in files for found in file.parent.glob(f"{file.name}-?"))


def stopped_and_gone_on(command, tmp_path, place, *, kill, number, processes=2):
    """Stop a command of two processes and give it again; return what the first said, and all batches."""
    first, second = tmp_path / "first", tmp_path / "second"
    before = functools.partial(note, place, first, kill=kill, number=number)
    commands = launched(2, *command, logs=tmp_path / "first.logs", before=before)
    assert [each.ended() for each in commands] == [ExitCode.STOPPED] * 2, commands[1].stderr
    assert all("Traceback" not in each.stderr for each in commands), commands[1].stderr
    assert "the same command goes on" in " ".join(commands[0].stdout.split()), commands[0].stdout
    before = functools.partial(note, place, second)
    for each in launched(processes, *command, logs=tmp_path / "second.logs", before=before):
        each.succeeded()
    assert 0 < batches(second) and 0 < batches(first)
    return commands[0].stdout, batches(first, second)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return a run on points, and points that it has not seen."""
    folder = tmp_path_factory.mktemp("teacher")
    points, other = (write_points(folder / str(n), "moons", n=n, seed=n).folder for n in (100, 90))
    config = write_config(folder / "config.yaml", points)
    driftmap("train", config, "--out", folder / "run", logs=folder / "logs").succeeded()
    return folder / "run", other


@pytest.mark.parametrize("processes", [2, 1])
def test_an_evaluation_goes_on_where_it_was(processes, scene, tmp_path):  # noqa: F811
    """The second row is another world size: its sums are the same but for rounding."""
    out = scene / f"stopped-{processes}"
    out.mkdir()
    whole = (*words(scene, scene / "run", scene / "whole"), f"--out={out / 'whole' / 'evaluation.json'}")
    (out / "whole").mkdir()
    for each in launched(2, *whole, logs=tmp_path / "whole.logs"):
        each.succeeded()
    command = (*words(scene, scene / "run", scene / "whole"), f"--out={out / 'evaluation.json'}")
    told, number = stopped_and_gone_on(
        command, tmp_path, PLACES["evaluate"], kill=1, number=signal.SIGTERM, processes=processes
    )
    assert "stopped after 20 samples" in told and number == 5, "45 samples are 5 batches, each done once"
    (info, found), (other_info, expected) = table(out), table(out / "whole")
    assert info == other_info and found.keys() == expected.keys()
    for name, value in expected.items():
        near = value if processes == 2 or value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
        assert found[name] == near, name
    assert not list(out.glob("*.unfinished"))


def test_likelihoods_go_on_where_they_were(teacher, tmp_path):
    run, other = teacher
    out, whole = tmp_path / "likelihood.json", tmp_path / "whole.json"
    command = ["likelihood", run, "--data", other, "--measures", "ode", "--batch-size", "10"]
    place = "driftmap.trainer.likelihood.FlowLikelihood.__call__"
    command_out = (*command, "--out", out)
    told, number = stopped_and_gone_on(command_out, tmp_path, place, kill=2, number=signal.SIGUSR2)
    assert "batches, which are kept in" in told and number == 9, "90 samples are 9 batches, each done once"
    driftmap(*command, "--out", whole, logs=tmp_path / "whole.logs").succeeded()
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    assert not list(tmp_path.glob("*.unfinished"))


def test_shards_that_are_made_stop_on_all_processes(teacher, tmp_path):
    """Encoding goes the same way; test_encode_processes.py has it with real encoders."""
    run, _ = teacher
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ("--num", "60", "--samples-per-shard", "6", "--batch-size", "3", "--steps", "2")
    command = ("trajectories", run, out, *options)
    told, number = stopped_and_gone_on(
        command, tmp_path, PLACES["trajectories"], kill=4, number=signal.SIGUSR1
    )
    assert " of 10 shards in " in told and 20 <= number <= 22, "at most half a shard of each is done again"
    driftmap("trajectories", run, whole, *options, logs=tmp_path / "whole.logs").succeeded()
    assert tree(out) == tree(whole)


def test_an_evaluation_in_a_run_goes_on_where_it_was(teacher, tmp_path):
    _, other = teacher
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    asked = {"every": 4, "held_out": str(other), "num_samples": 90, "batch_size": 9}
    config = write_config(tmp_path / "config.yaml", points, evaluation=asked, training__steps=4)
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = ("train", config, "--out", run)
    place = PLACES["validation"]
    told, number = stopped_and_gone_on(command, tmp_path, place, kill=2, number=signal.SIGTERM)
    assert "stopped and saved at step 4" in " ".join(told.split()) and number == 10
    for each in launched(2, "train", config, "--out", whole, logs=whole):
        each.succeeded()
    rows = [json.loads((folder / "validation.jsonl").read_text()) for folder in (run, whole)]
    assert rows[0].pop("seconds") >= 0 and rows[1].pop("seconds") >= 0 and rows[0] == rows[1]
    assert not list(run.glob("*.unfinished"))


def signalled_in_a_save(rank):
    """Let every signal come to the second process at once when it writes its first checkpoint."""
    from driftmap.trainer import saver

    write, asked = saver._Part.write, []

    def write_slowly(self):
        if rank == 1 and not asked:
            asked.append(True)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
        time.sleep(0.3)
        write(self)

    saver._Part.write = write_slowly


def test_a_checkpoint_under_way_is_finished(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    config = write_config(tmp_path / "config.yaml", points, training__keep=9, training__save_every=2)
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("train", config, "training.steps=1000", "--out", run)
    commands = launched(2, *words, logs=run, before=signalled_in_a_save)
    assert [command.ended() for command in commands] == [ExitCode.STOPPED] * 2, commands[1].stderr
    saved = list(checkpoints(run))
    step = int(saved[-1].removeprefix("step-"))
    assert f"saved at step {step}" in " ".join(commands[0].stdout.split()) and saved[0] == "step-00000002"
    assert not list((run / "checkpoints").glob("*.tmp"))
    for folder in (run, whole):
        for each in launched(2, "train", config, f"training.steps={step + 3}", "--out", folder, logs=folder):
            each.succeeded()
    ends = [checkpoints(folder)[f"step-{step + 3:08d}"] for folder in (run, whole)]
    assert ends[0] == ends[1] and list(read_losses(run)) == list(read_losses(whole))


def test_the_end_of_the_jobs_time_is_a_request_to_stop(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    config, run = write_config(tmp_path / "config.yaml", points, training__steps=10**6), tmp_path / "run"
    begun = time.time()
    # As of a job of twenty minutes that began nearly that long ago.
    end = int(begun + BEFORE_THE_END_S + 4)
    clock = {"SLURM_JOB_START_TIME": str(end - 1200), "SLURM_JOB_END_TIME": str(end)}
    command = driftmap("train", config, "--out", run, logs=tmp_path / "logs", **clock)
    assert command.ended() == ExitCode.STOPPED and time.time() >= end - BEFORE_THE_END_S
    assert "stopped and saved at step" in " ".join(command.stdout.split())
