"""The commands about jobs; like cli.py, without torch until one is called, and `--dry-run` never calls it."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


class ClusterName(StrEnum):
    """Where jobs run."""

    SLURM = "slurm"
    LOCAL = "local"
    DEBUG = "debug"


def submit(
    config: Annotated[Path, typer.Argument(help="a config or a workflow, a YAML file, see configs/")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value; lists such as optimizer.lr=1e-4,3e-4 are a sweep")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the run folder; by default runs/NAME of the config")
    ] = None,
    cluster: Annotated[
        ClusterName, typer.Option(help="where: a Slurm cluster, this machine, this process")
    ] = ClusterName.SLURM,
    nodes: Annotated[int, typer.Option(help="how many nodes")] = 1,
    min_nodes: Annotated[int | None, typer.Option(help="start, or go on, on so few nodes")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node")] = 0,
    tasks_per_node: Annotated[
        int | None, typer.Option(help="processes of a node; by default a GPU's")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of a process")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition")] = None,
    time: Annotated[
        str, typer.Option(help="minutes, H:M:S or D-H:M:S, after which it is queued again")
    ] = "60",
    save_before: Annotated[int, typer.Option(help="save so many seconds before the end of the time")] = 120,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="an option of sbatch, such as account=mine; repeatable")
    ] = None,
    module: Annotated[list[str] | None, typer.Option(help="`module load` this first; repeatable")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="a line of the job's script; repeatable")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; repeatable")] = None,
    container: Annotated[str | None, typer.Option(help="an image for pyxis' --container-image")] = None,
    container_mount: Annotated[list[str] | None, typer.Option(help="FROM:TO; repeatable")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="of a sweep, so many run at a time")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print all scripts and stop")] = False,
) -> None:
    """Queue the training of a config; preempted, out of time or killed, it is queued again and goes on.

    Lists of values are a sweep, a file of stages is a workflow, whose stages wait for each other.
    """
    from ..trainer.config import checked
    from .resources import Resources
    from .submission import submit_config
    from .workflow import is_workflow
    from .workflow_jobs import submit_workflow

    given = {"cluster": cluster.value, "nodes": nodes, "min_nodes": min_nodes, "time": time}
    given |= {"gpus_per_node": gpus_per_node, "tasks_per_node": tasks_per_node, "partition": partition}
    given |= {"cpus_per_task": cpus_per_task, "save_before": save_before, "sbatch": sbatch or ()}
    given |= {"modules": module or (), "setup": setup or (), "env": env or (), "container": container}
    given |= {"container_mounts": container_mount or ()}
    resources = checked(Resources, given, place="")
    if is_workflow(config):
        if at_once is not None:
            raise ValueError("--at-once has no effect on a workflow; leave it out")
        submit_workflow(config, overrides or [], out, resources, dry_run=dry_run, console=console)
        return
    place = out or Path("runs") / config.stem
    submit_config(
        config, overrides or [], place, resources, at_once=at_once, dry_run=dry_run, console=console
    )


def doctor(
    folder: Annotated[Path, typer.Argument(help="where runs are to be written")] = Path("runs"),
    json_file: Annotated[Path | None, typer.Option("--json", help="also write what was found here")] = None,
) -> None:
    """Look at versions, GPUs, network, clocks, file system and caches, on all processes of a launcher.

    Exit code 1 where something fails.
    """
    from .doctor import examine, show

    findings = examine(folder)
    first = os.environ.get("RANK", "0") == "0"
    well = show(findings, json_file if first else None, Console(quiet=not first))
    raise typer.Exit(0 if well else 1)
