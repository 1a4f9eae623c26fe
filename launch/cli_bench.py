"""The commands of `driftmap bench`; like cli.py, without torch until one is called."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

bench_app = typer.Typer(no_args_is_help=True, help="Measure what our code costs beside a reference.")
console = Console()


@bench_app.command("overhead")
def bench_overhead(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 9,
) -> None:
    """Time a trainer step against a bare PyTorch loop of the same model, batch and optimizer."""
    from .bench import overhead, show

    show(overhead(rounds=rounds), json_file, console)


@bench_app.command("ema")
def bench_ema(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 21,
) -> None:
    """Time an update of the running mean of the weights against diffusers' EMAModel."""
    from .bench import ema, show

    show(ema(rounds=rounds), json_file, console)


@bench_app.command("loader")
def bench_loader(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 9,
) -> None:
    """Time our loader beside webdataset, streaming and litdata on the same samples."""
    from .bench import show
    from .bench_loader import loader

    show(loader(rounds=rounds), json_file, console)


@bench_app.command("checkerboard")
def bench_checkerboard(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="a folder for pictures, and for weights from which another call goes on"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="lagrangian, eulerian, semigroup or 'semigroup uniform'; repeatable"),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="processor time of a rule's training")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="end after so many steps, if that is sooner")
    ] = None,
    waves: Annotated[int, typer.Option(min=0, help="of the state that the network sees beside it")] = 0,
    num_samples: Annotated[int, typer.Option("--samples", min=1, help="in a set that is measured")] = 2**16,
) -> None:
    """Train flow maps from scratch on the checkerboard by each rule; their KL beside the published one."""
    from .bench import show
    from .bench_checkerboard import Setting, checkerboard

    setting = Setting(minutes=minutes, steps=steps, state_frequencies=waves, num_samples=num_samples)
    rules = rule or ["lagrangian", "eulerian", "semigroup"]
    show(checkerboard(rules, setting, out=out), json_file, console)


@bench_app.command("tangent")
def bench_tangent(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 21,
) -> None:
    """Time the derivatives of the flow-map rules against a forward and a step of flow matching."""
    from .bench import show
    from .bench_tangent import tangent

    show(tangent(rounds=rounds), json_file, console)


@bench_app.command("diffflow")
def bench_diffflow(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="alternated rounds of each")] = 9,
) -> None:
    """Time a step of DiffFlow against one that simulates its path again, as the method was published."""
    from .bench import show
    from .bench_diffflow import diffflow

    show(diffflow(rounds=rounds), json_file, console)
