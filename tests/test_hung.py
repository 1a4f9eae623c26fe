"""A process that hangs is found by the others: named, with where it was and the stacks of all; the run ends.

Really hung: one that is stopped by SIGSTOP, and one whose loader sleeps and does not come back.
"""

import os
import signal
import time
from dataclasses import replace

import pytest

from driftmap.data.synthetic import write_points
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.heartbeat import Beat, hung
from driftmap.trainer.signals import ExitCode
from driftmap.trainer.world import WAITING
from runs import driftmap, launched, wait_until, write_config

BEAT = Beat(0, "n1", beats=9, step=3, stages=40, stage="reading a batch", for_s=5.0, where="a.py:1 (f)")


@pytest.fixture
def config(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    every = {"training__save_every": 2, "training__steps": 10**6}
    return write_config(tmp_path / "config.yaml", points, training__hung_after_s=1.5, **every)


def sleep_in_the_loader(rank):
    """Let the batches of the second process stop coming after some."""
    if rank != 1:
        return
    from driftmap.data.samples import Samples

    batch, calls = Samples.batch, iter(range(10**6))

    def batch_or_sleep(self, *arguments, **settings):
        if next(calls) == 20:
            time.sleep(10**4)
        return batch(self, *arguments, **settings)

    Samples.batch = batch_or_sleep


def test_a_loader_that_sleeps_ends_the_run_with_its_name(config, tmp_path):
    run = tmp_path / "run"
    commands = launched(2, "train", config, "--out", run, logs=run, before=sleep_in_the_loader)
    assert [command.ended() for command in commands] == [ExitCode.HUNG] * 2, commands[0].stderr
    for command in commands:
        assert "error: hung: process 1 on " in command.stderr and "process 0" not in command.stderr
        assert "reading a batch for " in command.stderr and "data/ahead.py:" in command.stderr
        assert "The same command goes on from the last checkpoint" in command.stderr
        assert "Traceback" not in command.stderr
    (stacks,) = (run / "hung").iterdir()
    assert "batch_or_sleep" in (stacks / "rank-1.txt").read_text()
    assert "all_reduce" in (stacks / "rank-0.txt").read_text()
    step = newest(run).state["step"] + 4  # whatever save was under way
    driftmap("train", config, f"training.steps={step}", "--out", run, logs=tmp_path / "logs").succeeded()
    assert not (run / "heartbeats").exists(), "a run that has ended says nothing any more"


def test_a_process_that_is_stopped_is_named_by_the_other(config, tmp_path):
    run = tmp_path / "run"
    first, second = launched(2, "train", config, "--out", run, logs=run)
    wait_until(lambda: len(list((run / "checkpoints").glob("step-*"))) > 1)
    os.kill(second.process.pid, signal.SIGSTOP)
    assert first.ended() == ExitCode.HUNG, first.stderr
    assert "error: hung: process 1 on " in first.stderr and "process 0" not in first.stderr
    (stacks,) = (run / "hung").iterdir()
    assert [file.name for file in stacks.iterdir()] == ["rank-0.txt"], "a stopped process writes nothing"
    second.process.kill()
    assert second.ended() == -signal.SIGKILL


def test_a_run_that_is_only_slow_goes_on(config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, "training.steps=3", "--out", run)
    commands = launched(2, *words, logs=run, before=slow)
    for command in commands:
        assert "hung" not in command.succeeded().stderr
    assert not (run / "hung").exists()


def slow(rank):
    """Let every batch of the second process take most of the time that is too long."""
    if rank != 1:
        return
    from driftmap.trainer.faults import AgreedBatches

    following = AgreedBatches.__next__

    def late(self):
        time.sleep(1.0)
        return following(self)

    AgreedBatches.__next__ = late


def test_who_hangs_is_who_is_silent_or_the_last_that_does_not_wait():
    waiting = replace(BEAT, rank=1, stages=41, stage=WAITING)
    later = [replace(beat, beats=beat.beats + 5) for beat in (BEAT, waiting)]
    assert hung([BEAT, waiting], later, 4.0) == later[:1]
    assert hung([BEAT, waiting], later, 6.0) == []
    assert hung([BEAT, waiting], [later[0], waiting], 4.0) == [waiting], "it has said nothing since"
    ahead = replace(later[0], rank=2, stages=42)
    assert hung([BEAT, waiting], [*later, ahead], 4.0) == later[:1], "who came further waits, or is ahead"
    assert hung([BEAT, waiting], later[1:], 4.0) == [], "a process that has ended does not hang"
