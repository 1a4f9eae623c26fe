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
