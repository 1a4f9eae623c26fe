"""The commands of `driftmap shards`; like cli.py, without torch until one is called."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ..trainer.progress import progress

shards_app = typer.Typer(no_args_is_help=True, help="Make, index, check and encode WebDataset shards.")
console = Console()


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


def _print_shards(shards: Any) -> None:
    console.print(
        f"{shards.folder}: {shards.num_samples} samples in {len(shards.shards)} shards, "
        f"members {', '.join(shards.extensions)}, fingerprint {shards.fingerprint[:12]}"
    )
