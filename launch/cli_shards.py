"""The commands of `driftmap shards`; like cli.py, without torch until one is called."""

import warnings
from dataclasses import replace
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
        typer.Argument(
            help="a folder of pictures (a sub-folder a class), a table (.csv .tsv .jsonl .parquet), a folder "
            "that `datasets` saved, shards to pack anew, hf:NAME, emoji:FOLDER, digits:train, digits:held_out"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="the folder of shards to write")],
    size: Annotated[int | None, typer.Option(help="side of the pictures; 256, for emoji 64")] = None,
    channels: Annotated[int | None, typer.Option(help="1 grey, 3 colour (default)")] = None,
    fit: Annotated[str | None, typer.Option(help="crop (default), pad or stretch to a square")] = None,
    background: Annotated[
        str | None, typer.Option(help="the colour behind transparency and padding; white")
    ] = None,
    picture: Annotated[str | None, typer.Option(help="the table's column of paths or bytes")] = None,
    label: Annotated[str | None, typer.Option("--class", help="its column of classes; '' for none")] = None,
    caption: Annotated[str | None, typer.Option(help="its column of captions; '' for none")] = None,
    licence: Annotated[str | None, typer.Option(help="the licence of the pictures, for the card")] = None,
    origin: Annotated[str | None, typer.Option(help="where the pictures are from, for the card")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; by size and CPUs")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="pictures a shard")] = 1000,
) -> None:
    """Write pictures as indexed WebDataset shards; the same command goes on after an interruption."""
    from ..data.sources import Request, find_source, make_shards

    request = Request(size, channels, cast(Any, fit), background, picture, label, caption)
    found = find_source(source, request)
    if licence is not None:
        found = replace(found, licence=licence)
    if origin is not None:
        found = replace(found, origin=origin)
    with (
        warnings.catch_warnings(record=True) as remarks,
        progress(out.name, found.num_samples, unit="pictures") as update,
    ):
        made = make_shards(found, out, samples_per_shard=samples_per_shard, workers=workers, progress=update)
    for remark in remarks:
        console.print(f"note: {remark.message}", markup=False, soft_wrap=True)
    _print_shards(made)
    for name in ("classes", "styles"):
        if names := made.info.get(name):
            console.print(
                f"{len(names)} {name}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}",
                soft_wrap=True,
            )


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
