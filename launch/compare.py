"""The study of the DiffFlow article: every method on every data set, trained alike and measured alike.

A config of a study (configs/compare-2d.yaml) has these sections, checked before anything runs:

    sets:                            # by the name that the page gives them; null leaves one out
      rings: {points: rings}         # of data/synthetic.py: drawn anew, num_train and num_test of them
      letter: {shards: shards/letter, held_out: shards/letter-held-out}   # rows of numbers, or points
    budget: {samples: 300000}        # that each training sees
    size_tolerance: 0.1              # of the numbers of trained parameters, largest to smallest
    shared:                          # what all methods have, beneath their own settings
      data: {batch_size: 1000}       # data, model, optimizer, training, ema: sections of a recipe
      model: {name: mlp, width: 128, depth: 3}      # `channels` is the number of a set's columns
      optimizer: {lr: 1e-3, decay: cosine}
      likelihood: {measures: [bound, iw, ode], bound_steps: [10, 30, 100, 1000], iw_steps: 30, paths: 16}
      sampling: {samplers: [ddpm], steps: [5, 10, 30, 100]}
    methods:                         # null leaves one out
      ddpm: {objective: {name: ddpm}}
      flow-matching: {objective: {name: flow_matching}, sampling: {samplers: [heun]}}

`training.steps` follows from the budget and the batch size; a method's own `budget` takes the place of the
study's. The settings of a method stand above the shared ones key by key; a section with another `name` is
another thing altogether.

`driftmap compare CONFIG --out DIR` writes

    DIR/sets/SET                     points as shards
    DIR/runs/SET/METHOD-RECIPE       an ordinary run; another recipe is another folder
    DIR/runs/SET/METHOD-RECIPE/study what was measured of it, a file each
    DIR/compare.html, compare.json   figures and tables of all that there is so far

Whatever is there is not done again. So a command that was stopped goes on, a method more costs its own
training only, and commands with some of the methods each may share the work.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.shards import ShardSet, write_atomically
from ..trainer.build import make_network, train
from ..trainer.checkpoint import newest
from ..trainer.config import ConfigError
from ..trainer.launcher import launcher
from ..trainer.meaning import meaning_of
from ..trainer.recipe import Recipe, resolved
from ..trainer.strategy import trainable
from ..trainer.study import MethodSection, Study, check_sizes, recipe_of
from ..trainer.study_page import table, write_page
from .compare_data import DataSet, data_set
from .compare_measure import measured

PROCESSOR = "processor.jsonl"  # of a run: its steps and the processor time that they took, a line a session

console = Console()


@dataclass(frozen=True)
class Training:
    """A method on a set: the recipe, where its run is, and how many parameters are trained."""

    method: str
    section: MethodSection
    recipe: Recipe
    folder: Path
    num_parameters: int

    @property
    def done(self) -> int:
        """How many steps its last checkpoint has."""
        checkpoint = newest(self.folder)
        return checkpoint.state["step"] if checkpoint else 0


def compare(study: Study, out: Path) -> dict[str, Any]:
    """Train and measure what is not there yet, write the page after each, and return all numbers.

    Raises KeyboardInterrupt where a training was stopped by a signal; it is saved by then.
    """
    if launcher().size > 1:
        raise ConfigError(
            "compare trains one small model after the other in one process, but "
            f"{launcher().size} were launched; start it without a launcher"
        )
    sets = [data_set(name, section, out, seed=study.seed) for name, section in study.sets.items()]
    plan = {data.name: trainings(study, data, out) for data in sets}
    found: dict[str, Any] = {
        data.name: {"about": data.about(study.num_samples, side=study.density_side), "methods": {}}
        for data in sets
    }
    for data in sets:
        for training in plan[data.name]:
            console.rule(f"{data.name}: {training.method}")
            _train(training)
            told = {"num_parameters": training.num_parameters, **_processor_time(training.folder)}
            rows = measured(study, training.section, training.recipe, data, training.folder)
            found[data.name]["methods"][training.method] = {**told, **rows}
            write_atomically(out / "compare.json", json.dumps(_numbers(found), indent=1).encode())
            write_page(out / "compare.html", found, title=out.name)
    return _numbers(found)


def trainings(study: Study, data: DataSet, out: Path) -> list[Training]:
    """Return the trainings on a set; ConfigError where the sizes of the networks differ too much."""
    found = []
    for method, section in study.methods.items():
        steps = (section.budget or study.budget).steps(section.data["batch_size"])
        recipe = recipe_of(study, method, section, shards=data.train, steps=steps)
        folder = out / "runs" / data.name / f"{method}-{digest(recipe, data.train)}"
        found.append(Training(method, section, recipe, folder, _num_parameters(recipe)))
    check_sizes(
        {each.method: each.num_parameters for each in found}, study.size_tolerance, where=f"sets.{data.name}"
    )
    return found


def digest(recipe: Recipe, train: ShardSet) -> str:
    """Return a name for a recipe on these data, wherever they are."""
    settings = resolved(recipe)
    settings["data"] |= {"shards": train.fingerprint}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _num_parameters(recipe: Recipe) -> int:
    with torch.random.fork_rng():
        model = make_network({**recipe.model, "means": meaning_of(recipe.objective)})
    return sum(parameter.numel() for parameter in trainable(model).values())


def _train(training: Training) -> None:
    """Train to the end, or raise KeyboardInterrupt where it was stopped."""
    before = training.done
    if before >= training.recipe.training.steps:
        return
    since = time.process_time()
    run = train(training.recipe, training.folder)
    line = {"steps": run.step - before, "seconds": time.process_time() - since}
    with (training.folder / PROCESSOR).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    if not run.complete:
        console.print(f"stopped and saved at step {run.step} of {training.folder}; the same command goes on")
        raise KeyboardInterrupt


def _processor_time(folder: Path) -> dict[str, float | None]:
    """Return the seconds of processor time that a step took, and all that are known of took."""
    file = folder / PROCESSOR
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    steps = sum(line["steps"] for line in lines)
    return {"seconds_per_step": sum(line["seconds"] for line in lines) / steps if steps else None}


def print_study(found: dict[str, Any], console: Console) -> None:
    """Print the table of each set, a method a column."""
    for name, each in found.items():
        shown = table(each["about"], each["methods"])
        printed = Table("", title=name)
        for method in shown["columns"]:
            printed.add_column(method, justify="right")
        for heading, cells in shown["rows"]:
            printed.add_row(heading, *cells)
        console.print(printed)


def _numbers(found: Any) -> Any:
    """Return what can be written as JSON: all but tensors."""
    if isinstance(found, dict):
        kept = {key: value for key, value in found.items() if not isinstance(value, torch.Tensor)}
        return {key: _numbers(value) for key, value in kept.items()}
    return [_numbers(each) for each in found] if isinstance(found, list) else found
