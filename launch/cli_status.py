"""The commands about what was submitted; none of them needs torch, so a login node answers at once."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_ASK_EVERY_S = 2.0  # a scheduler is shared by many
_WIDE = 200  # columns, where nobody reads at a terminal

Place = Annotated[str, typer.Argument(help="the folder of a run, a sweep or a workflow, or the id of a job")]
Under = Annotated[Path, typer.Option(help="where to look for the id of a job")]


def status(
    place: Place = "runs",
    under: Under = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Tell how jobs are doing and how far runs are: steps, pictures a second, time left, last checkpoint."""
    from .status import folders_of, rows_of, statuses_of, table_of

    found = statuses_of(folders_of(place, under=under))
    if as_json:
        print(json.dumps(rows_of(found), indent=1))
        return
    console = Console()
    Console(width=None if console.is_terminal else _WIDE).print(
        table_of(found), highlight=False, markup=False
    )


def logs(
    place: Place,
    under: Under = Path("runs"),
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on with what comes, until all jobs are over")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="how many of the last lines")] = 20,
    rank: Annotated[int, typer.Option(min=0, help="of which process")] = 0,
) -> None:
    """Show what the newest jobs printed; of a run without a job, the lines of its log."""
    from .job_logs import follow as show
    from .status import folders_of, statuses_of

    folders = folders_of(place, under=under)
    asked_at, over = 0.0, False

    def ended() -> bool:
        nonlocal asked_at, over
        if time.monotonic() - asked_at > _ASK_EVERY_S:
            over, asked_at = all(each.over for each in statuses_of(folders)), time.monotonic()
        return over

    show(
        lambda: {folder.name: _files(folder, rank) for folder in folders},
        lambda line: print(line, flush=True),
        lines=lines,
        ended=ended if follow else None,
    )


def stop(
    place: Place,
    under: Under = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="end at once, without saving")] = False,
) -> None:
    """Let jobs save and end for good; jobs that wait are cancelled, the last ones of a workflow first."""
    from .control import stop as stop_job
    from .status import folders_of, statuses_of

    for each in reversed(statuses_of(folders_of(place, under=under))):
        print(f"{each.folder}: {stop_job(each, now=now)}")


def resume(place: Place, under: Under = Path("runs")) -> None:
    """Submit again, with the same resources, what has stopped or failed before its end."""
    from .control import resume as resume_job
    from .resources import Resources
    from .snapshot import snapshot_code
    from .status import folders_of, statuses_of
    from .workflow_jobs import FILE, submit_workflow

    if (Path(place) / FILE).is_file():
        submit_workflow(Path(place) / FILE, (), None, Resources(), dry_run=False, console=Console())
        return
    for each in statuses_of(folders_of(place, under=under)):
        print(f"{each.folder}: {resume_job(each, code=lambda folder=each.folder: snapshot_code(folder))}")


def _files(folder: Path, rank: int) -> list[Path]:
    """Return what to show of a folder: what its newest job prints, or its log."""
    from .jobs import jobs_of

    jobs = jobs_of(folder)
    if not jobs:
        return [folder / "log.jsonl"]
    return [jobs[-1].logs / f"{jobs[-1].job_id}_{rank}_log.{kind}" for kind in ("out", "err")]
