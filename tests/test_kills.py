"""Fifty kills at random moments: all go on from a whole checkpoint, and no sample is lost or doubled.

Nor is one when another number of processes goes on in the end.
"""

import functools
import json
import os
import random
import signal
import time
from collections import Counter

import pytest

from driftmap.data.synthetic import write_points
from driftmap.trainer.checkpoint import folders, newest, verify
from runs import driftmap, launched, wait_until, write_config

NUM_KILLS = 50
NUM_SAMPLES = 100
BATCH = 32


def record(file, rank):
    """Write the positions and the keys of the samples of every step, at its end and before it is saved."""
    from driftmap.trainer import build

    build_run = build.build

    def build_and_record(recipe, folder):
        run = build_run(recipe, folder)

        def write(run, losses):
            keys = run.batches.keys_of(losses["index"])
            line = {"step": run.step, "samples": list(zip(losses["index"].tolist(), keys, strict=True))}
            with file.with_name(f"{file.name}-{rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")

        run.hooks.append(write)
        return run

    build.build = build_and_record


def read(file):
    """Return the samples of every step that a launch finished, by step, of both processes."""
    steps = {}
    for rank in range(2):
        path = file.with_name(f"{file.name}-{rank}.jsonl")
        for text in path.read_text().splitlines() if path.exists() else []:
            line = json.loads(text)
            steps.setdefault(line["step"], []).extend(tuple(sample) for sample in line["samples"])
    return steps


@pytest.mark.slow
def test_fifty_kills_of_two_processes(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=NUM_SAMPLES, seed=0).folder
    config = write_config(tmp_path / "config.yaml", points, training__save_every=3, training__steps=10**6)
    run, chance = tmp_path / "run", random.Random(0)
    kept, resumed_at, during_a_save = {}, [], 0
    for kill in range(NUM_KILLS):
        seen = tmp_path / f"seen-{kill}"
        words = ("train", config, "--out", run)
        commands = launched(2, *words, logs=run, before=functools.partial(record, seen))
        first = seen.with_name(f"{seen.name}-0.jsonl")
        wait_until(lambda path=first, kill=kill: path.exists() or kill % 5 == 4)  # some die before any step
        time.sleep(chance.uniform(0, 0.5))
        for command in commands:
            os.kill(command.process.pid, signal.SIGKILL)
        assert [command.ended() for command in commands] == [-signal.SIGKILL] * 2, commands[0].stderr
        assert "warning" not in commands[0].stderr
        during_a_save += any((run / "checkpoints").glob("*.tmp"))
        assert [verify(folder) for folder in folders(run)] == [None] * len(folders(run))
        checkpoint = newest(run)
        reached = checkpoint.state["step"] if checkpoint else 0
        steps = read(seen)
        start = resumed_at[-1] if resumed_at else 0
        assert not steps or min(steps) == start + 1, "it did not go on from the last whole checkpoint"
        kept |= {step: steps[step] for step in range(start + 1, reached + 1)}
        resumed_at.append(reached)
    assert resumed_at == sorted(resumed_at) and len(set(resumed_at)) > 10 and during_a_save > 5
    last = resumed_at[-1] + 5
    alone = tmp_path / "alone"
    words = ("train", config, f"training.steps={last}", "--out", run)
    driftmap(*words, logs=tmp_path / "last.logs", before=functools.partial(record, alone, 0)).succeeded()
    kept |= read(alone)
    assert sorted(kept) == list(range(1, last + 1))
    samples = sorted(sample for step in kept.values() for sample in step)
    assert [position for position, _ in samples] == list(range(last * BATCH))
    for epoch in range(last * BATCH // NUM_SAMPLES):
        keys = [key for _, key in samples[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]]
        assert set(Counter(keys).values()) == {1} and len(keys) == NUM_SAMPLES
