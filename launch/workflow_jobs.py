"""From a workflow to queued jobs: all stages are checked, then queued in order, each after those before it.

What is whole is left out, and so is a stage whose job still waits or runs: the same command again queues what
is missing.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..data.writer import write_atomically
from ..trainer.config import ConfigError, checked, read_config
from .resources import Resources
from .slurm import Order, Work, script_of, submit
from .snapshot import snapshot_code, snapshot_config
from .stage import config_of
from .status import statuses_of
from .workflow import Stage, Workflow, read_workflow

FILE = "workflow.yaml"


def submit_workflow(
    file: Path,
    overrides: Sequence[str],
    folder: Path | None,
    resources: Resources,
    *,
    dry_run: bool,
    console: Console,
) -> None:
    """Queue the missing stages of a workflow; `resources` stand above the file's, beneath a stage's own.

    Raises ConfigError before anything is queued.
    """
    default = asdict(Resources())
    given = {name: value for name, value in asdict(resources).items() if value != default[name]}
    workflow = read_workflow(file, overrides, folder=folder, resources=given)
    asked = _asked(workflow)
    missing = workflow.missing
    if dry_run:
        for stage in missing:
            order = Order(tuple(f"JOB-OF-{name}" for name in stage.after if name in _names(missing)))
            work, logs = Work(stage.words, stage.folder), workflow.folder / "jobs"
            print(f"# {stage.name}: driftmap {' '.join(stage.words)}")
            print(script_of([work], asked[stage.name], logs=logs, order=order))
        return
    settings = {stage.name: _checked_settings(stage) for stage in workflow.stages}
    works = {stage.name: _work(stage, settings[stage.name]) for stage in missing}
    _keep(file, overrides, workflow)
    _queue(workflow, works, asked, console)


def _queue(workflow: Workflow, works: dict[str, Work], asked: dict[str, Resources], console: Console) -> None:
    """Queue what is missing and has no job yet, and tell of every stage."""
    code = snapshot_code(workflow.folder)
    known = {status.folder: status for status in statuses_of([stage.folder for stage in workflow.stages])}
    ids: dict[str, str] = {}
    here: str | None = None  # on this machine one stage runs at a time
    for stage in workflow.stages:
        status = known[stage.folder]
        if status.job is not None and not status.over:
            ids[stage.name], told = status.job.job_id, f"job {status.job.job_id}, {status.told}"
        elif stage.name not in works:
            told = f"left out, {stage.made.place} is whole"
        else:
            before = tuple(ids[name] for name in stage.after if name in ids)
            own = asked[stage.name]
            if own.cluster == "local" and here is not None and here not in before:
                before = (*before, here)
            order = Order(before if own.cluster != "debug" else ())  # in this process the others are over
            (job,) = submit([works[stage.name]], own, logs=workflow.folder / "jobs", code=code, order=order)
            ids[stage.name] = here = job.job_id
            told = f"job {job.job_id}" + (f" after {', '.join(before)}" if before else "")
        console.print(f"{stage.name}: {told}", highlight=False, markup=False, soft_wrap=True)


def _asked(workflow: Workflow) -> dict[str, Resources]:
    """Return the checked resources of all stages; ConfigError where they are not on one cluster."""
    asked = {
        stage.name: checked(Resources, stage.resources, place=f"stages.{stage.name}.resources")
        for stage in workflow.stages
    }
    first, *others = asked
    for name in others:
        if asked[name].cluster != asked[first].cluster:
            raise ConfigError(
                f"stages.{name}.resources.cluster: {asked[name].cluster!r}, but that of {first!r} is "
                f"{asked[first].cluster!r}; stages can wait for each other on one cluster only"
            )
    return asked


def _checked_settings(stage: Stage) -> dict[str, Any] | None:
    """Return the resolved settings of a stage that trains, None for another.

    Raises ConfigError at a mistake in its config, or where its folder holds a run of another recipe.
    """
    config = config_of(stage.words)
    if config is None:
        return None
    from ..trainer.build import check_inputs, check_recipe
    from ..trainer.recipe import recipe_from, resolved

    try:
        recipe = recipe_from(read_config(*config))
        check_recipe(recipe, stage.folder)
        if not stage.after:  # else its inputs are still to be made
            check_inputs(recipe)
    except (ValueError, OSError) as error:
        raise ConfigError(f"stages.{stage.name}.run: {error}") from error
    return resolved(recipe)


def _work(stage: Stage, settings: dict[str, Any] | None) -> Work:
    """Return what the job of a stage does, with its config as it is now."""
    if settings is None:
        return Work(stage.words, stage.folder)
    file = snapshot_config(stage.folder, settings)
    return Work(("train", str(file), "--out", str(stage.folder)), stage.folder)


def _keep(file: Path, overrides: Sequence[str], workflow: Workflow) -> None:
    """Write the workflow as it was submitted into its folder, for `driftmap resume`."""
    settings = {**read_config(file, overrides), "folder": str(workflow.folder)}
    resources = {stage.name: stage.resources for stage in workflow.stages}
    settings["stages"] = {
        name: {**stage, "resources": resources[name]} for name, stage in settings["stages"].items()
    }
    workflow.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(workflow.folder / FILE, yaml.safe_dump(settings, sort_keys=False).encode())


def _names(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]
