"""The whole line on one machine: pictures, autoencoder, teacher, flow map, evaluation, report, pipeline.

Every stage is what its own command does, on configs/quickstart-*.yaml; a finished stage is found and not done
again, so the same command goes on after an interruption.
"""

from importlib import resources
from pathlib import Path

from rich.console import Console

from ..data.shards import ShardSet
from ..data.sources import Source, digits, make_shards
from ..trainer.build import train
from ..trainer.config import read_config
from ..trainer.encode import encode
from ..trainer.progress import progress
from ..trainer.recipe import Recipe, recipe_from
from ..trainer.report import write_report
from .evaluation import EvaluationRequest, evaluate_run, print_evaluation
from .export import check_export, export

console = Console()


def recipe_named(name: str, overrides: list[str]) -> Recipe:
    """Return the recipe of configs/NAME.yaml with overrides."""
    with resources.as_file(resources.files("driftmap.configs") / f"{name}.yaml") as file:
        return recipe_from(read_config(file, overrides))


def quickstart(
    out: Path, *, rule: str = "semigroup", overrides: list[str] | None = None, num_samples: int = 1000
) -> None:
    """Run the whole line in `out`; `rule` names the flow-map recipe; overrides go to every recipe.

    Raises KeyboardInterrupt when a stage was stopped by a signal; its run is saved by then.
    """
    pictures = _shards(digits("train"), out / "pictures")
    _shards(digits("held_out"), out / "held-out")
    extra = overrides or []
    _stage("2a. autoencoder", "quickstart-autoencoder", out / "autoencoder", pictures, *extra)
    latents = _encoded(pictures, out)
    _stage(
        "2b. classifier, the features of the evaluation",
        "quickstart-classifier",
        out / "classifier",
        pictures,
        *extra,
    )
    _stage("3. teacher, flow matching", "quickstart-teacher", out / "teacher", latents, *extra)
    teacher = f"teacher.run={out / 'teacher'}"
    start = f"model.from_run={out / 'teacher'}"
    recipe, folder = f"quickstart-flow-map-{rule}", out / f"flow-map-{rule}"
    _stage(f"4. flow map, {rule} rule", recipe, folder, latents, teacher, start, *extra)
    console.rule("5. evaluation")
    request = EvaluationRequest(
        folder,
        features=str(out / "classifier"),
        held_out=out / "held-out",
        num_samples=num_samples,
        references=out / "references",
    )
    evaluation = evaluate_run(request, out / "evaluation.json")
    print_evaluation(evaluation, console)
    console.rule("6. report")
    runs = [folder, out / "teacher", out / "autoencoder", out / "classifier"]
    console.print(write_report(out / "report.html", runs=runs, evaluation=out / "evaluation.json"))
    console.rule("7. diffusers pipeline")
    export(folder, out / "pipeline")
    difference = check_export(out / "pipeline", folder)
    console.print(f"{out / 'pipeline'}: loaded without driftmap, samples differ by {difference:.1e}")


def _shards(source: Source, out: Path) -> ShardSet:
    """Write one split as shards, with progress."""
    console.rule(f"1. shards: {out.name}")
    with progress(out.name, source.num_samples, unit="pictures") as update:
        return make_shards(source, out, progress=update)


def _encoded(pictures: ShardSet, out: Path) -> ShardSet:
    """Encode the pictures by the autoencoder just trained, with progress."""
    with progress("latents", pictures.num_samples, unit="pictures") as update:
        return encode(pictures, out / "latents", autoencoder=out / "autoencoder", progress=update)


def _stage(title: str, config: str, folder: Path, shards: ShardSet, *overrides: str) -> None:
    """Train one recipe to its end, or raise KeyboardInterrupt where it was stopped."""
    console.rule(title)
    run = train(recipe_named(config, [f"data.shards={shards.folder}", *overrides]), folder)
    if not run.complete:
        console.print(f"stopped and saved at step {run.step}; the same command goes on from there")
        raise KeyboardInterrupt
