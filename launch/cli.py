"""The commands. Heavy imports stay inside them: `driftmap --help` answers without torch."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..trainer.launcher import launcher
from ..trainer.signals import ExitCode, interrupt_at_signals, lost
from .cli_bench import bench_app
from .cli_compare import compare
from .cli_jobs import doctor, submit
from .cli_likelihood import likelihood
from .cli_publish import app as try_app
from .cli_publish import export, publish
from .cli_sample import invert, sample
from .cli_shards import shards_app
from .cli_status import logs, resume, status, stop
from .cli_trajectories import trajectories

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
config_app = typer.Typer(no_args_is_help=True, help="Tell about configs.")
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
    """Run the command line; a person's mistake becomes one message, a request to stop its exit code."""
    interrupt_at_signals()
    try:
        launcher()
        # The deepspeed launcher says it in the environment, too.
        app([word for word in sys.argv[1:] if not word.startswith("--local_rank=")])
    except KeyboardInterrupt:
        sys.exit(ExitCode.STOPPED)
    except Exception as error:
        others = lost(error)
        if not others and not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(ExitCode.LOST if others else ExitCode.MISTAKE)


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
    console.quiet = run.strategy.world.rank != 0
    if not run.complete:
        console.print(
            f"stopped and saved at step {run.step} of {folder}; the same command goes on from there"
        )
        raise KeyboardInterrupt
    console.print(f"{folder}: step {run.step} of {recipe.training.steps}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a YAML file, see configs/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as model.width=1024")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="how many processes, one a GPU")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of one GPU; by default of the one here, else 80")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the plan here")] = None,
) -> None:
    """Tell what a config costs before it runs: memory by strategy, operations, checkpoints; and advise."""
    from ..trainer.config import read_config
    from ..trainer.recipe import recipe_from
    from .plan import plan as plan_of
    from .plan import show

    found = plan_of(recipe_from(read_config(config, overrides or [])), world_size, memory_gib=memory)
    show(found, json_file, console)


app.command()(submit)
app.command()(doctor)
app.command()(status)
app.command()(logs)
app.command()(stop)
app.command()(resume)
app.command()(sample)
app.command()(invert)


@app.command()
def evaluate(
    run: RunFolder,
    features: Annotated[
        str,
        typer.Option(
            help="what to see with: the run of a classifier, efficientnet-lite0, inception:FILE, "
            "dinov2:PLACE or clip:PLACE"
        ),
    ],
    held_out: Annotated[Path, typer.Option(help="shards of held-out pictures")],
    teacher: Annotated[
        Path | None, typer.Option(help="the run to compare with; by default its teacher")
    ] = None,
    nfe: Annotated[str, typer.Option(help="numbers of evaluations")] = "1,2,4,8",
    many: Annotated[int, typer.Option(min=4, help="evaluations of the teacher's accurate solution")] = 32,
    num_samples: Annotated[int, typer.Option(min=6, help="pictures to compare")] = 1000,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    out: Annotated[Path | None, typer.Option(help="by default RUN/evaluation.json")] = None,
    training: Annotated[
        Path | None, typer.Option(help="shards of training pictures; by default those of the autoencoder")
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="the run of a classifier for class accuracy; by default --features")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="a CLIP for caption alignment: its folder, or its id in the cache")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures at once; a grid shows one batch")] = 250,
    references: Annotated[
        Path | None, typer.Option(help="keeps what is measured of real pictures; in DRIFTMAP_CACHE")
    ] = None,
    shift: Annotated[float, typer.Option(min=0.01, help="move the student's times towards noise")] = 1.0,
    guidance: Annotated[float | None, typer.Option(min=1, help="of a student that takes it")] = None,
) -> None:
    """Measure quality against number of evaluations, with floors and blindness check.

    Under torchrun the processes share the samples; pictures and table stay the same.
    """
    from .evaluation import EvaluationRequest, evaluate_run, parse_nfe, print_evaluation

    request = EvaluationRequest(
        run=run,
        features=features,
        held_out=held_out,
        teacher=teacher,
        nfe=parse_nfe(nfe),
        many=many,
        num_samples=num_samples,
        seed=seed,
        training=training,
        probe=probe,
        captions=captions,
        batch_size=batch_size,
        references=references,
        shift=shift,
        guidance=guidance,
    )
    evaluation = evaluate_run(request, out or run / "evaluation.json")
    console.quiet = os.environ.get("RANK", "0") != "0"
    print_evaluation(evaluation, console)


app.command()(likelihood)
app.command()(compare)
app.command()(trajectories)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    evaluation: Annotated[
        Path | None, typer.Option(help="by default evaluation.json of the first run")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="by default report.html in the first run")] = None,
) -> None:
    """Write run folders as one self-contained HTML page, those with an evaluation.json side by side."""
    from ..trainer.report import write_report

    page = write_report(
        out or runs[0] / "report.html", runs=runs, evaluation=evaluation or runs[0] / "evaluation.json"
    )
    console.print(page)


app.command()(export)
app.command()(publish)
app.command("app")(try_app)


@app.command()
def ema(
    run: RunFolder,
    width: Annotated[float, typer.Option(help="the relative width of the mean, such as 0.12")],
    out: Annotated[Path, typer.Option(help="the safetensors file to write")],
    step: Annotated[int | None, typer.Option(help="a snapshot's step; by default the last")] = None,
) -> None:
    """Write the running mean of any width from the snapshots of a run (ema.snapshot_every)."""
    from ..trainer.posthoc import mean_of_width

    mean = mean_of_width(run, width, step=step)
    mean.write(out)
    console.print(
        f"{out}: width {width} at step {mean.step}, the sum of {mean.num_means} means; "
        f"its profile misses by {mean.residual:.2%}"
    )


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from ..trainer.recipe import schema

    print(json.dumps(schema(), indent=1))


if __name__ == "__main__":
    main()
