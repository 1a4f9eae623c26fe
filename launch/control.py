"""To stop jobs so that runs are saved, and to submit again what has stopped."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from ..trainer.config import checked
from .job_states import ask_slurm, controller_of
from .jobs import Job
from .resources import Resources
from .slurm import Work, submit
from .status import RunStatus


def stop(status: RunStatus, *, now: bool = False) -> str:
    """Ask a job to save and end for good, or with `now` end it at once; return what was done, in words."""
    if status.job is None:
        return "no job was submitted for it; where it runs, press Ctrl-C"
    if status.over or status.state is None:
        return f"nothing to stop, job {status.job.job_id}: {status.told}"
    if status.job.cluster == "slurm":
        return _stop_slurm(status.job, at_once=now or status.state.waits)
    return _stop_here(status.job, at_once=now or status.state.waits)


def _stop_slurm(job: Job, *, at_once: bool) -> str:
    if at_once:
        ask_slurm("scancel", job.job_id)
        return f"cancelled job {job.job_id}"
    # First, or the job's script would queue it again when its processes have saved.
    ask_slurm("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    ask_slurm("scancel", f"--signal={signal.SIGTERM.name.removeprefix('SIG')}", job.job_id)
    return f"asked job {job.job_id} to save and stop"


def _stop_here(job: Job, *, at_once: bool) -> str:
    shell = controller_of(job)
    if shell is None:
        return f"job {job.job_id} has just ended"
    processes = [shell, *shell.children(recursive=True)]
    if at_once:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return f"killed job {job.job_id}"
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "submitit.local._local" in process.cmdline():  # it forwards the signal to all processes
                process.send_signal(signal.SIGTERM)
    return f"asked job {job.job_id} to save and stop"


def resume(status: RunStatus, *, code: Callable[[], Path]) -> str:
    """Submit again what the last job of a folder was to do; return what was done, in words.

    `code` makes the folder of the package that it will run.
    """
    if status.job is None:
        return "no job was submitted for it; give its `driftmap submit` or `driftmap train` command again"
    if not status.over:
        return f"job {status.job.job_id} is {status.told}"
    if status.finished:
        return "finished, nothing to resume"
    resources = checked(Resources, status.job.resources, place="")
    work = Work(status.job.command, status.job.folder)
    (job,) = submit([work], resources, logs=status.job.logs, code=code())
    return f"job {job.job_id} goes on"
