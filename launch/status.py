"""What is known of runs: the job of each, how it is doing, and how far the run is by its own folder."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from .job_states import JobState, states_of
from .jobs import FILE, Job, jobs_of
from .run_progress import RunProgress, progress_of

_INNER = ("*", "stages/*", "*/*", "*/stages/*")  # where the runs of sweeps and workflows are
_MOST_LEVELS = 4  # below the folder in which a job's id is looked for


@dataclass(frozen=True)
class RunStatus:
    """A run folder, or the folder of another stage, with its newest job."""

    folder: Path
    job: Job | None
    state: JobState | None
    progress: RunProgress | None

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step, or another stage has ended well."""
        if self.progress is not None:
            return self.progress.finished
        return self.state is not None and self.state.word == "COMPLETED"

    @property
    def over(self) -> bool:
        """Whether nothing more will come; of a run without a job that is known at its last step only."""
        return self.state.over if self.state is not None else self.finished

    @property
    def told(self) -> str:
        """The state in words."""
        if self.over and self.finished:
            return "finished"
        return "no job" if self.state is None else str(self.state)


def folders_of(place: str, *, under: Path) -> list[Path]:
    """Return the run folders that a folder or the id of a job names, in the order of their submission.

    A folder is that of a run, of a sweep or of a workflow. An id is looked for below `under`.
    """
    folder = Path(place)
    if folder.is_dir():
        found = [folder] if _is_run(folder) else []
        found += [inner for form in _INNER for inner in folder.glob(form) if _is_run(inner)]
        if not found:
            raise ValueError(
                f"{folder} holds neither runs nor jobs; give the folder of a run, sweep or workflow"
            )
        return sorted(found, key=lambda inner: (_submitted(inner), inner.name))
    files = [file for level in range(1, _MOST_LEVELS + 1) for file in under.glob("*/" * level + FILE)]
    ids = {file.parent: {job.job_id for job in jobs_of(file.parent)} for file in files}
    found = [
        inner
        for inner in ids
        if {place} & {part for each in ids[inner] for part in (each, each.split("_")[0])}
    ]
    if not found:
        raise ValueError(f"{place!r} is no folder, and no job of this id was submitted below {under}")
    return sorted(found)


def statuses_of(folders: Sequence[Path]) -> list[RunStatus]:
    """Return what is known of each folder, asking the scheduler once."""
    jobs = {folder: (jobs_of(folder) or [None])[-1] for folder in folders}
    states = states_of([job for job in jobs.values() if job is not None])
    return [
        RunStatus(folder, job, states[job.job_id] if job else None, progress_of(folder))
        for folder, job in jobs.items()
    ]


def refuse_busy(folders: Sequence[Path]) -> None:
    """Raise ValueError where a folder has a job that is not over: two would write to it at once."""
    for status in statuses_of(folders):
        if status.job is not None and not status.over:
            raise ValueError(
                f"{status.folder}: its job {status.job.job_id} is {status.told}; wait for it, or give "
                f"`driftmap stop {status.folder}` first"
            )


def table_of(statuses: Sequence[RunStatus]) -> Table:
    """Return a table for a reader, a row a run."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "job", "state", "step", "img/s", "time left", "loss", "last checkpoint", "last line"):
        table.add_column(name, no_wrap=True)
    for status in statuses:
        job = status.job.job_id if status.job else "-"
        table.add_row(str(status.folder), job, status.told, *_cells(status.progress))
    return table


def rows_of(statuses: Sequence[RunStatus]) -> list[dict[str, Any]]:
    """Return the same for programs."""
    return [
        {
            "folder": str(status.folder),
            "job": status.job.job_id if status.job else None,
            "state": status.told,
            "over": status.over,
            "finished": status.finished,
            "progress": vars(status.progress) if status.progress else None,
        }
        for status in statuses
    ]


def _cells(progress: RunProgress | None) -> list[str]:
    if progress is None:
        return ["-"] * 6
    saved = "-" if progress.saved_step is None else f"step {progress.saved_step}, {_ago(progress.saved_s)}"
    return [
        f"{progress.step} of {progress.steps}",
        "-" if progress.images_per_s is None else f"{progress.images_per_s:.0f}",
        "-" if progress.left_s is None else str(timedelta(seconds=round(progress.left_s))),
        "-" if progress.loss is None else f"{progress.loss:.4g}",
        saved,
        _ago(progress.told_s),
    ]


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{timedelta(seconds=round(max(0.0, seconds)))} ago"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (FILE, "recipe.yaml"))


def _submitted(folder: Path) -> float:
    """Return when something was first submitted for a folder; what never was comes last."""
    return next((job.time for job in jobs_of(folder)), time.time())
