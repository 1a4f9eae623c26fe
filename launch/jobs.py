"""What was submitted, kept in each run's folder: jobs.jsonl, a line a submission, the newest last.

Of whether a job waits, runs or is over, Slurm knows: see job_states.py.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Job:
    """A job and what it was asked to do: `driftmap COMMAND` in `tasks` processes on up to `nodes` nodes."""

    job_id: str  # of Slurm, such as 17 or 17_2 in an array; of the controlling process with `local`
    cluster: str  # slurm, local or debug
    command: tuple[str, ...]
    folder: Path  # of the run, or of what else the command makes
    logs: Path  # where submitit keeps {job_id}_{rank}_log.out, .err and the pickles of a job
    nodes: int
    tasks: int
    resources: dict[str, Any]  # as they were given, to submit the same again
    depends_on: tuple[str, ...] = ()  # ids of jobs that have to end well before
    time: float = field(default_factory=time.time)  # of the submission, in seconds since the epoch


def add_job(job: Job) -> None:
    """Add a job to those of its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(job), default=os.fspath) + "\n"
    with (job.folder / FILE).open("a") as stream:
        stream.write(line)  # in one piece, so that submissions at the same time do not mix


def jobs_of(folder: Path) -> list[Job]:
    """Return the jobs that were submitted for a folder, the newest last."""
    file = folder / FILE
    return [_job(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _job(line: str) -> Job:
    row = json.loads(line)
    paths = {name: Path(row[name]) for name in ("folder", "logs")}
    lists = {name: tuple(row[name]) for name in ("command", "depends_on")}
    return Job(**{**row, **paths, **lists})
