"""The script of a job queues it again where that leads somewhere, by how processes ended and what is saved.

Here srun, squeue and scontrol are files that say what they are told to; test_slurm_jobs.py has real ones.
"""

import os
import subprocess

import pytest

from driftmap.launch.resources import Resources
from driftmap.launch.slurm import FRUITLESS_RESTARTS, Work, script_of
from driftmap.trainer.signals import TOLD, ExitCode, tell_end

JOB = "71"


@pytest.fixture
def job(tmp_path):
    """Return a function that runs the script, and returns its exit code and whether the job comes again."""
    places = {name: tmp_path / name for name in ("run", "jobs", "bin", "requeued")}
    for name in ("run", "jobs", "bin"):
        places[name].mkdir()
    script = script_of([Work(("train", "x.yaml"), places["run"])], Resources(nodes=2), logs=places["jobs"])

    def program(name, *lines):
        file = places["bin"] / name
        file.write_text("\n".join(["#!/bin/bash", *lines]))
        file.chmod(0o755)

    def run(code, *told, saves=None, state="RUNNING", requeue=1):
        ends = [f'echo {word.name} > "${TOLD}-{rank}"' for rank, word in enumerate(told)]
        folder = places["run"] / "checkpoints" / f"step-{saves or 0:08d}"
        saved = [f"mkdir -p {folder}", f"touch {folder}/manifest.json"] if saves else []
        program("srun", *ends, *saved, f"exit {code}")
        program("squeue", f"echo {state}")
        program(
            "scontrol",
            f'[ "$1" = requeue ] && echo $2 >> {places["requeued"]}',
            f'echo "   Requeue={requeue} Restarts=0"',
        )
        places["requeued"].unlink(missing_ok=True)
        names = {"PATH": f"{places['bin']}:{os.environ['PATH']}", "SLURM_JOB_ID": JOB}
        done = subprocess.run(["bash", "-c", script], env=names, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        again = places["requeued"].exists()
        assert again == ("requeued, to go on" in done.stdout)
        return done.returncode, again

    return run


@pytest.mark.parametrize(
    ("srun", "told", "expected"),
    [
        (0, (), (ExitCode.DONE, False)),
        (ExitCode.STOPPED, (), (ExitCode.STOPPED, True)),
        (137, (), (137, True)),
        (ExitCode.LOST, (), (ExitCode.LOST, True)),
        (1, (), (ExitCode.LOST, True)),  # of srun itself, which has not reached a node
        (1, (ExitCode.FAILED,), (ExitCode.FAILED, False)),
        # What srun did to the others does not hide why.
        (143, (ExitCode.FAILED,), (ExitCode.FAILED, False)),
        (143, (ExitCode.MISTAKE,), (ExitCode.MISTAKE, False)),
        (137, (ExitCode.HUNG, ExitCode.HUNG), (ExitCode.HUNG, False)),
        (143, (ExitCode.FAILED, ExitCode.MISTAKE), (ExitCode.MISTAKE, False)),
    ],
)
def test_how_processes_end_decides(job, srun, told, expected):
    assert job(srun, *told) == expected


def test_a_new_checkpoint_is_worth_another_start(job):
    assert job(143, ExitCode.FAILED, saves=10) == (ExitCode.FAILED, True)
    assert job(143, ExitCode.FAILED, saves=10) == (ExitCode.FAILED, False), "it is the same one"
    assert job(143, ExitCode.MISTAKE, saves=20) == (ExitCode.MISTAKE, False)


def test_a_job_that_is_killed_again_and_again_ends(job):
    for _ in range(FRUITLESS_RESTARTS):
        assert job(137) == (137, True)
    assert job(ExitCode.STOPPED) == (ExitCode.STOPPED, True), "asked to stop is not killed"
    assert job(137) == (137, False)
    assert job(137, saves=10) == (137, True), "with something new saved it counts from the beginning"
    for _ in range(FRUITLESS_RESTARTS):
        assert job(137) == (137, True)
    assert job(137) == (137, False)


def test_what_is_cancelled_or_stopped_does_not_come_again(job):
    assert job(ExitCode.STOPPED, state="CANCELLED") == (ExitCode.STOPPED, False)
    assert job(ExitCode.STOPPED, saves=10, requeue=0) == (ExitCode.STOPPED, False)


def test_a_process_tells_why_it_ends_only_in_a_job(tmp_path, monkeypatch):
    monkeypatch.delenv(TOLD, raising=False)
    tell_end(ExitCode.HUNG)
    monkeypatch.setenv(TOLD, str(tmp_path / f"{JOB}.told"))
    monkeypatch.setenv("SLURM_PROCID", "3")
    tell_end(ExitCode.HUNG)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("71.told-3", "HUNG\n")]
