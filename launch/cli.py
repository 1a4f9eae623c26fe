"""The commands. Heavy imports stay inside them: `driftmap --help` answers without torch."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ..trainer.progress import progress

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
shards_app = typer.Typer(no_args_is_help=True, help="Make, index, check and encode WebDataset shards.")
config_app = typer.Typer(no_args_is_help=True, help="Tell about configs.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure what our code costs beside a reference.")
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
console = Console()

RunFolder = Annotated[Path, typer.Argument(help="a run folder that `driftmap train` made")]


class Rule(StrEnum):
    """The flow-map rules that quickstart knows."""

    SEMIGROUP = "semigroup"
    LAGRANGIAN = "lagrangian"


def main() -> None:
    """Run the command line; a person's mistake becomes one message, an interruption exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


@app.callback()
def about() -> None:
    """Train latent diffusion models and distil them into few-step flow maps."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/quickstart"),
    rule: Annotated[Rule, typer.Option(help="the flow-map rule of the distillation")] = Rule.SEMIGROUP,
) -> None:
    """Go the whole way in some minutes, from pictures to an evaluated few-step pipeline."""
    from .quickstart import quickstart as run

    run(out, rule=rule.value)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file, see configs/")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as optimizer.lr=3e-4")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the run folder; by default runs/NAME of the config")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="check, print the resolved config and stop")] = False,
) -> None:
    """Train a config; the same command goes on where the run was stopped."""
    from ..trainer.config import read_config
    from ..trainer.recipe import recipe_from, resolved

    recipe = recipe_from(read_config(config, overrides or []))
    if check:
        import yaml

        from ..trainer.build import check_inputs

        check_inputs(recipe)
        print(yaml.safe_dump(resolved(recipe), sort_keys=False), end="")
        return
    from ..trainer.build import train as run_training

    folder = out or Path("runs") / config.stem
    run = run_training(recipe, folder)
    if not run.finished:
        console.print(
            f"stopped and saved at step {run.step} of {folder}; the same command goes on from there"
        )
        raise KeyboardInterrupt
    console.print(f"{folder}: step {run.step} of {recipe.training.steps}")


@app.command()
def sample(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("samples.png"),
    nfe: Annotated[int, typer.Option(min=1, help="network evaluations a sample")] = 4,
    count: Annotated[int, typer.Option(min=1, help="how many pictures")] = 40,
    label: Annotated[int | None, typer.Option(help="one class; by default all in turn")] = None,
    guidance: Annotated[
        float, typer.Option(help="classifier-free guidance; costs two evaluations a step")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="sample i of a seed is always the same")] = 0,
) -> None:
    """Sample a run into a grid: jumps of a flow map, Euler steps of a velocity network."""
    from .evaluation import sample_run

    sample_run(run, out, nfe=nfe, count=count, label=label, guidance=guidance, seed=seed)
    console.print(out)


@app.command()
def evaluate(
    run: RunFolder,
    features: Annotated[Path, typer.Option(help="the run of a classifier, whose features are compared")],
    held_out: Annotated[Path, typer.Option(help="shards of held-out pictures")],
    teacher: Annotated[
        Path | None, typer.Option(help="the run to compare with; by default its teacher")
    ] = None,
    nfe: Annotated[str, typer.Option(help="numbers of evaluations")] = "1,2,4,8",
    many: Annotated[int, typer.Option(min=4, help="evaluations of the teacher's accurate solution")] = 32,
    num_samples: Annotated[int, typer.Option(min=2, help="pictures to compare")] = 1000,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    out: Annotated[Path | None, typer.Option(help="by default RUN/evaluation.json")] = None,
) -> None:
    """Measure quality against number of evaluations, with floor and blindness check."""
    from .evaluation import EvaluationRequest, evaluate_run, parse_nfe, print_evaluation

    request = EvaluationRequest(run, features, held_out, teacher, parse_nfe(nfe), many, num_samples, seed)
    print_evaluation(evaluate_run(request, out or run / "evaluation.json"), console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    evaluation: Annotated[
        Path | None, typer.Option(help="by default evaluation.json of the first run")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="by default report.html in the first run")] = None,
) -> None:
    """Write run folders as one self-contained HTML page."""
    from ..trainer.report import write_report

    page = write_report(
        out or runs[0] / "report.html", runs=runs, evaluation=evaluation or runs[0] / "evaluation.json"
    )
    console.print(page)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="the pipeline folder to write")],
    autoencoder: Annotated[Path | None, typer.Option(help="the autoencoder's run, if it has moved")] = None,
) -> None:
    """Write a flow map as a diffusers pipeline and check its samples in a process without driftmap."""
    from .export import check_export
    from .export import export as write

    write(run, out, autoencoder=autoencoder)
    console.print(f"{out}: loaded without driftmap, samples differ by {check_export(out, run):.1e}")


@shards_app.command("make")
def shards_make(
    source: Annotated[
        str,
        typer.Argument(help="a folder of pictures (a sub-folder a class), or digits:train, digits:held_out"),
    ],
    out: Annotated[Path, typer.Argument(help="the folder of shards to write")],
    size: Annotated[int, typer.Option(min=1, help="side of the pictures, for folders")] = 256,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 grey, 3 colour, for folders")] = 3,
) -> None:
    """Write pictures as indexed WebDataset shards."""
    from ..data import sources

    kind, _, split = source.partition(":")
    found = (
        sources.digits(cast(Any, split))
        if kind == "digits" and split
        else sources.folder(source, size=size, channels=channels)
    )
    with progress(out.name, found.num_samples, unit="pictures") as update:
        made = sources.make_shards(found, out, progress=update)
    _print_shards(made)


@shards_app.command("index")
def shards_index(folder: Annotated[Path, typer.Argument(help="a folder of tars")]) -> None:
    """Index tars, ours or others', so that they can be trained on."""
    from ..data.index import list_tars
    from ..data.shards import index_shards

    with progress(folder.name, len(list_tars(folder)), unit="tars") as update:
        indexed = index_shards(folder, progress=update)
    _print_shards(indexed)


@shards_app.command("check")
def shards_check(folder: Annotated[Path, typer.Argument(help="a folder of indexed tars")]) -> None:
    """Verify every member of every tar; exit code 1 where there are problems."""
    from ..data.check import check_shards
    from ..data.index import list_tars

    with progress(folder.name, len(list_tars(folder)), unit="tars") as update:
        problems = check_shards(folder, progress=update)
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    console.print(f"{folder}: {len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


@shards_app.command("encode")
def shards_encode(
    source: Annotated[Path, typer.Argument(help="shards of pictures")],
    out: Annotated[Path, typer.Argument(help="the folder of latent shards to write")],
    autoencoder: Annotated[Path, typer.Option(help="the run of the autoencoder")],
) -> None:
    """Encode pictures to latents: posterior mean and std, their scale, the encoder's fingerprint."""
    from ..data.shards import ShardSet
    from ..trainer.encode import encode_latents

    pictures = ShardSet.open(source)
    with progress(out.name, pictures.num_samples, unit="pictures") as update:
        _print_shards(encode_latents(pictures, out, autoencoder=autoencoder, progress=update))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from ..trainer.recipe import schema

    print(json.dumps(schema(), indent=1))


@bench_app.command("overhead")
def bench_overhead(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 9,
) -> None:
    """Time a trainer step against a bare PyTorch loop of the same model, batch and optimizer."""
    from .bench import overhead, show

    show(overhead(rounds=rounds), json_file, console)


def _print_shards(shards: Any) -> None:
    console.print(
        f"{shards.folder}: {shards.num_samples} samples in {len(shards.shards)} shards, "
        f"members {', '.join(shards.extensions)}, fingerprint {shards.fingerprint[:12]}"
    )


if __name__ == "__main__":
    main()
