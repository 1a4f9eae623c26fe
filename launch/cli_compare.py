"""The command `driftmap compare`; like cli.py, without torch until it is called."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def compare(
    config: Annotated[
        Path, typer.Argument(help="a YAML file of sets and methods, see configs/compare-2d.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as budget.samples=1000 or methods.ffjord=null")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="where everything goes; by default runs/NAME of the config")
    ] = None,
) -> None:
    """Train several methods on several data sets, measure them alike, and write one page of all.

    The same command goes on where it was stopped; what is there is not made again.
    """
    from ..trainer.config import read_config
    from ..trainer.study import study_from
    from .compare import compare as run
    from .compare import print_study

    study = study_from(read_config(config, overrides or []))
    folder = out or Path("runs") / config.stem
    console = Console()
    print_study(run(study, folder), console)
    console.print(folder / "compare.html", soft_wrap=True)
