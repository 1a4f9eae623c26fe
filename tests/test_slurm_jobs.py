"""On two nodes of a real Slurm a run ends bit for bit like the run that nothing happened to.

Jobs are preempted, requeued by hand, at the end of their time; a step is cancelled, a process killed, a node
lost. Each goes on by itself within the seconds that stand here, no sample is lost or doubled, what was saved
is whole; and what its owner cancels does not come back.
"""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import slow_matching
from latents import write_latents
from slurm.cluster import GRACE_S, NODE_LOST_S, REQUEUE_S

from driftmap.data.synthetic import write_points
from driftmap.launch.job_states import states_of
from driftmap.launch.jobs import jobs_of
from driftmap.trainer.checkpoint import newest, verify
from runs import checkpoints, driftmap, launched, read_losses, write_config

ROOT = Path(__file__).parent.parent
BATCH = 16

SAVED_S = 15  # from a request to stop until all processes have saved and ended
STARTED_S = (
    90  # from Slurm's start of a job to its first steps: up to four processes import torch on two cores
)
AGAIN_S = SAVED_S + REQUEUE_S + 5 + STARTED_S  # from whatever ends a job to its next steps
OUT_OF_TIME_S = 60 + 30  # of a job of a minute: Slurm looks every half minute


def wait(condition, limit_s, what):
    """Wait for a condition and print how long it took; fail after `limit_s` seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.1)
    print(f"{what}: {time.monotonic() - began:.1f} s of {limit_s} s")


class Submitted:
    """A run of slow steps in a job, seen from outside: by its state, and by the samples that it was given."""

    def __init__(self, work, slurm, name, *words):
        self.run, self.notes = work / name, work / f"{name}-notes"
        self.notes.mkdir()
        known = {slow_matching.FOLDER: self.notes, slow_matching.SECONDS: 0.1, "OMP_NUM_THREADS": 1}
        known["PYTHONPATH"] = ROOT / "tests"
        env = [word for pair in known.items() for word in ("--env", "{}={}".format(*pair))]
        words = ("submit", work / "slow.yaml", "--out", self.run, "--nodes", "2", *env, *words)
        driftmap(*words, logs=work / "commands", **slurm.environment).succeeded()
        (self.job,) = jobs_of(self.run)
        self.last = -1  # start that has been seen
        self.after_loss: set[int] = set()

    @property
    def state(self):
        """Slurm's word for the state of the job."""
        return states_of([self.job])[self.job.job_id].word

    @property
    def starts(self):
        """The numbers of the job's starts after which it was given samples; some end before."""
        return sorted({int(file.name.split("-")[0]) for file in self.notes.iterdir()})

    def processes(self, start):
        """Return how many processes were given samples after the n-th start of the job."""
        return len(list(self.notes.glob(f"{start}-*")))

    def positions(self, start):
        """Return the positions in the stream of all samples after the n-th start, in order."""
        files = self.notes.glob(f"{start}-*")
        return sorted(int(word) for file in files for word in file.read_text().split())

    def trains(self, why, limit_s=AGAIN_S, lost=False):
        """Wait until the job trains after another start; `lost` says that steps may have been lost before."""

        def trains():
            new = [start for start in self.starts if start > self.last]
            return new and len(self.positions(new[-1])) > 8 * BATCH

        wait(trains, limit_s, f"{self.run.name}, {why}: it trains")
        self.after_loss |= {start for start in self.starts if start > self.last and lost}
        self.last = self.starts[-1]

    def saves(self, why, limit_s=SAVED_S):
        """Wait until all processes of the job have ended and all that they have done is saved."""

        def saved():
            checkpoint = None if self.state in ("RUNNING", "COMPLETING") else newest(self.run)
            return checkpoint and checkpoint.state["samples"] == self.positions(self.last)[-1] + 1

        wait(saved, limit_s, f"{self.run.name}, {why}: it has saved and ended")

    def assert_exactly_once(self):
        """Assert that no sample is lost or doubled, but for what a loss repeats, and all is whole."""
        given = {start: self.positions(start) for start in self.starts}
        kept = list(given[0])
        for before, after in pairwise(given):
            begun = given[after][0]
            assert begun == given[before][-1] + 1 or (after in self.after_loss and begun % BATCH == 0)
            kept = [place for place in kept if place < begun] + given[after]
        assert kept == list(range(newest(self.run).state["samples"]))
        assert [verify(folder) for folder in (self.run / "checkpoints").iterdir()] == [None] * 3
        assert not list(self.run.rglob("*.tmp"))
        assert list(read_losses(self.run)) == list(range(1, len(kept) // BATCH + 1))


@pytest.fixture
def work(tmp_path):
    """Return a folder with a config of slow steps."""
    points = write_points(tmp_path / "shards", "moons", n=100, seed=0).folder
    changes = {"data__batch_size": BATCH, "objective": {"name": "slow_matching:SlowMatching"}}
    changes |= {"training__steps": 10**6, "training__save_every": 5, "training__keep": 3}
    write_config(tmp_path / "slow.yaml", points, **changes)
    return tmp_path


def test_two_nodes_train_what_two_processes_train(slurm, tmp_path):
    """The quickstart's teacher, on random latents of its size."""
    shards = write_latents(tmp_path / "shards", side=8, channels=4).folder
    words = (ROOT / "configs/quickstart-teacher.yaml", f"data.shards={shards}", "training.steps=8")
    words += ("training.log_every=1", "optimizer.warmup_steps=4")
    nodes, here = tmp_path / "nodes", tmp_path / "here"
    queued = ("submit", *words, "--out", nodes, "--nodes", "2", "--env", "OMP_NUM_THREADS=1")
    driftmap(*queued, logs=tmp_path / "commands", **slurm.environment).succeeded()
    (job,) = jobs_of(nodes)
    for process in launched(2, "train", *words, "--out", here, logs=here):
        process.succeeded()
    wait(lambda: states_of([job])[job.job_id].over, 60, "a run on two nodes")
    assert states_of([job])[job.job_id].word == "COMPLETED"
    printed = (job.logs / f"{job.job_id}_0_log.out").read_text()
    assert "2 processes on 1 node, gloo, started by srun" in " ".join(printed.split())
    losses, expected = read_losses(nodes), read_losses(here)
    print("\n".join(f"step {n}: {losses[n]['loss']} {expected[n]['loss']}" for n in losses))
    assert losses == expected
    assert len(losses) == 8
    assert checkpoints(nodes) == checkpoints(here)


@pytest.mark.slow
def test_whatever_ends_a_job_its_run_goes_on(slurm, work):
    steady = Submitted(work, slurm, "steady", "--time", "20")
    short = Submitted(work, slurm, "short", "--time", "1", "--save-before", "5", "--min-nodes", "1")
    job = steady.job.job_id
    steady.trains("submitted")
    short.trains("submitted")
    slurm.told("scontrol", "requeue", job)
    steady.saves("scontrol requeue")
    steady.trains("scontrol requeue")
    slurm.told("scancel", f"{job}.0")  # Slurm kills its processes
    steady.trains("scancel of its step", lost=True)
    slurm.kill_task(job, 1)
    steady.trains("kill -9 of process 1", lost=True)
    short.trains("end of its time", OUT_OF_TIME_S + AGAIN_S)
    slurm.told("scontrol", "update", f"JobId={short.job.job_id}", "TimeLimit=20")

    slurm.told("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    steady.saves("preempted", GRACE_S)
    for run in (steady, short):
        run.trains("preempted")

    assert {run.processes(start) for run in (steady, short) for start in run.starts} == {2}
    slurm.kill_node("n2")
    short.trains("a node lost", NODE_LOST_S + AGAIN_S, lost=True)
    assert short.processes(short.last) == 1
    slurm.start_node("n2")
    steady.trains("a node lost and come back", lost=True)
    assert steady.processes(steady.last) == 2

    for run in (steady, short):
        slurm.told("scancel", run.job.job_id)
        run.saves("scancel")
        assert run.state == "CANCELLED"
        run.assert_exactly_once()

    reference = work / "reference"
    lasts = {run: newest(run.run).state["step"] for run in (steady, short)}
    for run, last in sorted(lasts.items(), key=lambda item: item[1]):
        words = ("train", work / "slow.yaml", f"training.steps={last}", "--out", reference)
        for process in launched(2, *words, logs=reference):
            process.succeeded()
        losses, expected = read_losses(run.run), read_losses(reference)
        print(f"{run.run.name}: {last} steps, the last with loss {losses[last]['loss']}")
        name = f"step-{last:08d}"
        if run is steady:
            assert losses == expected
            assert checkpoints(steady.run)[name] == checkpoints(reference)[name]
        else:  # a part of it was of one process
            for step, row in losses.items():
                assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-3), step


def test_a_process_that_fails_ends_the_job_for_good(slurm, work):
    """Whatever srun does to the other one: the job would fail again."""
    failing = Submitted(work, slurm, "failing", "--env", f"{slow_matching.BROKEN}=1")
    job, logs = failing.job, failing.job.logs
    wait(
        lambda: states_of([job])[job.job_id].over,
        STARTED_S + SAVED_S,
        "a job whose process 1 fails has ended",
    )
    assert failing.state == "FAILED"
    assert "RuntimeError: broken" in (logs / f"{job.job_id}_1_log.err").read_text()
    assert "requeued" not in (logs / f"{job.job_id}_0_log.out").read_text()
    told = slurm.told("scontrol", "show", "job", job.job_id)
    assert " Restarts=0 " in told and " ExitCode=1:0" in told


def test_one_of_a_sweep_that_is_cancelled_does_not_come_back(slurm, work):
    words = ("submit", work / "slow.yaml", "optimizer.lr=1e-2,2e-2", "--out", work / "sweep")
    env = ("--env", f"PYTHONPATH={ROOT / 'tests'}", "--env", f"{slow_matching.SECONDS}=0.1")
    driftmap(*words, *env, logs=work / "commands", **slurm.environment).succeeded()
    jobs = [jobs_of(work / "sweep" / f"lr={rate}")[-1] for rate in ("1e-2", "2e-2")]
    wait(lambda: all((job.folder / "log.jsonl").exists() for job in jobs), AGAIN_S, "both train")
    slurm.told("scancel", jobs[0].job_id)
    wait(lambda: states_of(jobs)[jobs[0].job_id].word == "CANCELLED", SAVED_S, "one is cancelled")
    time.sleep(REQUEUE_S + 2)
    words = [states_of(jobs)[job.job_id].word for job in jobs]
    assert words == ["CANCELLED", "RUNNING"]
    folder = jobs[0].folder
    wait(lambda: len(read_losses(folder)) == newest(folder).state["step"], SAVED_S, "it has saved all")
    slurm.told("scancel", jobs[1].job_id)
    wait(lambda: states_of(jobs)[jobs[1].job_id].over, SAVED_S, "the other one is cancelled")
