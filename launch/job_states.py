"""What became of jobs: asked of Slurm, or of the processes of this machine.

squeue knows what waits, runs, or ended minutes ago; sacct what ended before. Without accounting, and on this
machine, the rest is told by the file that submitit leaves of a job that came to its end.
"""

import pickle
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from submitit.core.utils import JobPaths

from .jobs import Job

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = (
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
)


@dataclass(frozen=True)
class JobState:
    """Slurm's word for a job's state, why it waits, and where it runs."""

    word: str
    reason: str = ""
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """Whether it has not started, or will start again."""
        return self.word in _WAITING

    @property
    def over(self) -> bool:
        """Whether nothing of it will come any more."""
        return self.word not in _WAITING + _RUNNING

    def __str__(self) -> str:
        told = self.reason or self.nodes
        return self.word.lower().replace("_", " ") + (f" ({told})" if told else "")


def states_of(jobs: Sequence[Job]) -> dict[str, JobState]:
    """Return the states of jobs by their ids.

    Raises ValueError where Slurm does not answer.
    """
    on_slurm = [job.job_id for job in jobs if job.cluster == "slurm"]
    found = _squeue(on_slurm)
    found |= _sacct([job_id for job_id in on_slurm if job_id not in found])
    return {job.job_id: found.get(job.job_id) or _state_here(job) for job in jobs}


def ask_slurm(*words: str) -> str:
    """Return what a command of Slurm says; ValueError in its own words where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"cannot ask Slurm: {error}; give this command on a login node") from error
    if done.returncode:
        raise ValueError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def controller_of(job: Job) -> psutil.Process | None:
    """Return the process of a local job, its shell or submitit's controller; None where it is gone."""
    try:
        process = psutil.Process(int(job.job_id))
        ours = any(str(job.logs) in word for word in process.cmdline())  # the number may be another's by now
    except (psutil.Error, ValueError):
        return None
    return process if ours and process.status() != psutil.STATUS_ZOMBIE else None


def _squeue(ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of the jobs that the controller remembers."""
    if not ids:
        return {}
    numbers = ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in ids))
    try:
        # `-r` tells of every task of an array.
        told = ask_slurm("squeue", "-h", "-r", "-t", "all", "-j", numbers, "-o", "%i|%T|%r|%N")
    except ValueError as error:
        if "Invalid job id" in str(error):  # it has forgotten them
            return {}
        raise
    found = {}
    for line in told.splitlines():
        job_id, word, reason, nodes = line.split("|", 3)
        found[job_id] = JobState(word, reason if word in _WAITING and reason != "None" else "", nodes)
    return {job_id: found[job_id] for job_id in ids if job_id in found}


def _sacct(ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of jobs that ended before; none where there is no accounting."""
    if not ids:
        return {}
    try:
        told = ask_slurm("sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State,NodeList")
    except ValueError:
        return {}
    rows = [line.split("|", 2) for line in told.splitlines()]
    # Such as "CANCELLED by 0".
    return {job_id: JobState(word.split()[0], nodes=nodes) for job_id, word, nodes in rows}


def _state_here(job: Job) -> JobState:
    """Return the state of a job by its process on this machine, or by the result that it left."""
    if job.cluster == "local" and controller_of(job) is not None:
        began = JobPaths(job.logs, job.job_id, 0).stdout.exists()
        return JobState("RUNNING") if began else JobState("PENDING", "for the job before it")
    result = JobPaths(job.logs, job.job_id, 0).result_pickle
    if not result.exists():
        return JobState("ENDED", "without a result")
    with result.open("rb") as stream:
        return JobState("COMPLETED" if pickle.load(stream)[0] == "success" else "FAILED")
