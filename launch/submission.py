"""From a config to queued jobs: checked and planned on the login node, with code and config as they are."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..trainer.config import read_config
from .resources import Resources
from .slurm import Order, Work, script_of, submit
from .status import refuse_busy
from .sweep import points_of


def submit_config(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    resources: Resources,
    *,
    at_once: int | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Queue the training of a config, or of each point of a sweep as an array in subfolders of `out`."""
    from .snapshot import snapshot_code, snapshot_config

    points = points_of(overrides)
    if at_once is not None and len(points) == 1:
        raise ValueError("--at-once has no effect on a single run; give lists of values, or leave it out")
    order = Order(at_once=at_once)
    settings = [read_config(config, point.overrides) for point in points]
    folders = [out / point.name for point in points]
    logs = out / "jobs"
    if dry_run:
        works = [
            _train(config, folder, overrides=point.overrides)
            for folder, point in zip(folders, points, strict=True)
        ]
        console.print(
            script_of(works, resources, logs=logs, order=order), markup=False, highlight=False, soft_wrap=True
        )
        return
    from ..trainer.build import check_inputs, check_recipe
    from ..trainer.recipe import recipe_from, resolved
    from .plan import plan, show

    refuse_busy(folders)
    recipes = [recipe_from(each) for each in settings]
    for recipe, folder in zip(recipes, folders, strict=True):
        check_inputs(recipe)
        check_recipe(recipe, folder)
    show(plan(recipes[0], resources.tasks), None, console)
    files = [
        snapshot_config(folder, resolved(recipe)) for folder, recipe in zip(folders, recipes, strict=True)
    ]
    works = [_train(file, folder) for file, folder in zip(files, folders, strict=True)]
    jobs = submit(works, resources, logs=logs, code=snapshot_code(out), order=order)
    for job in jobs:
        console.print(f"{job.folder}: job {job.job_id}", highlight=False)


def _train(config: Path, folder: Path, *, overrides: Sequence[str] = ()) -> Work:
    return Work(("train", str(config), *overrides, "--out", str(folder)), folder)
