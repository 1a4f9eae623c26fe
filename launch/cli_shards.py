"""The commands of `driftmap shards`; like cli.py, without torch until one is called."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            "that `datasets` saved, shards to pack anew, hf:NAME, emoji:FOLDER, digits:train, "
            "digits:held_out, tabular:FILE of numbers, density:NAME:PART:FOLDER"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="the folder of shards to write")],
    size: Annotated[int | None, typer.Option(help="side of the pictures; 256, for emoji 64")] = None,
    buckets: Annotated[
        str | None,
        typer.Option(
            help="several sizes, HEIGHTxWIDTH,...: each picture gets the one nearest in proportions"
        ),
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 grey, 3 colour (default)")] = None,
    fit: Annotated[str | None, typer.Option(help="crop (default), pad or stretch to the size")] = None,
    background: Annotated[
        str | None, typer.Option(help="the colour behind transparency and padding; white")
    ] = None,
    picture: Annotated[str | None, typer.Option(help="the table's column of paths or bytes")] = None,
    label: Annotated[str | None, typer.Option("--class", help="its column of classes; '' for none")] = None,
    caption: Annotated[str | None, typer.Option(help="its column of captions; '' for none")] = None,
    drop: Annotated[str | None, typer.Option(help="columns of numbers to leave out: A,B")] = None,
    licence: Annotated[str | None, typer.Option(help="the licence of the pictures, for the card")] = None,
    origin: Annotated[str | None, typer.Option(help="where the pictures are from, for the card")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="write this share to OUT-held-out instead, by a hash of the keys")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; by size and CPUs")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="pictures a shard")] = 1000,
) -> None:
    """Write pictures as indexed WebDataset shards; the same command goes on after an interruption."""
    from ..data.buckets import parse_sizes
    from ..data.sources import Request, find_source, make_shards
    from ..data.split import split

    sizes = parse_sizes(buckets) if buckets is not None else None
    dropped = tuple(drop.split(",")) if drop else None
    request = Request(
        size, channels, cast(Any, fit), background, picture, label, caption, sizes, dropped, held_out
    )
    found = find_source(source, request)
    if licence is not None:
        found = replace(found, licence=licence)
    if origin is not None:
        found = replace(found, origin=origin)
    parts = {out: found}
    if held_out is not None:
        parts = dict(zip((out, out.with_name(f"{out.name}-held-out")), split(found, held_out), strict=True))
    for folder, part in parts.items():
        with _told(folder.name, part.num_samples) as update:
            made = make_shards(
                part, folder, samples_per_shard=samples_per_shard, workers=workers, progress=update
            )
        _print_shards(made)
    _print_about(found.info)


def _print_about(info: dict[str, Any]) -> None:
    """Print what a person should know of the samples: filled gaps, classes, styles."""
    if filled := _filled(info):
        console.print(f"noise fills the gaps between the values of {filled}", soft_wrap=True)
    for name in ("classes", "styles"):
        if names := info.get(name):
            console.print(
                f"{len(names)} {name}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}",
                soft_wrap=True,
            )


def _filled(info: dict[str, Any]) -> str:
    """Return the columns of a table whose values repeat, with their steps; see data/tabular.py."""
    table = info.get("table", {"columns": [], "steps": []})
    steps = zip(table["columns"], table["steps"], strict=True)
    return ", ".join(f"{column} (multiples of {step:g})" for column, step in steps if step)


@contextmanager
def _told(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of making pictures, and then what was remarked about them."""
    with (
        warnings.catch_warnings(record=True) as remarks,
        progress(name, total, unit="pictures") as update,
    ):
        yield update
    for remark in remarks:
        console.print(f"note: {remark.message}", markup=False, soft_wrap=True)


@shards_app.command("index")
def shards_index(folder: Annotated[Path, typer.Argument(help="a folder of tars")]) -> None:
    """Index tars, ours or others', so that they can be trained on."""
    from ..data.index import list_tars
    from ..data.shards import index_shards

    with progress(folder.name, len(list_tars(folder)), unit="tars") as update:
        indexed = index_shards(folder, progress=update)
    _print_shards(indexed)


@shards_app.command("check")
def shards_check(
    place: Annotated[str, typer.Argument(help="a folder of indexed tars, or its address")],
    repair: Annotated[
        bool, typer.Option("--repair", help="write bad indices and the card anew first; tars are not touched")
    ] = False,
) -> None:
    """Verify every member of every tar, a line for each bad sample; exit code 1 where there are problems."""
    from ..data.check import check_remote, check_shards
    from ..data.index import list_tars
    from ..data.remote import place_of
    from ..data.repair import repair_shards
    from ..data.shards import ShardSet

    folder = place_of(place)
    if isinstance(folder, str):
        if repair:
            raise ValueError(f"{folder} is an address; repair the folder where it is stored, or a copy of it")
        shards = ShardSet.open(folder)
        with progress(folder, len(shards.shards), unit="tars") as update:
            problems = check_remote(shards, progress=update)
    else:
        num_tars = len(list_tars(folder))
        if repair:
            with progress("repair", num_tars, unit="tars") as update:
                done = repair_shards(folder, progress=update)
            for line in done:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        with progress(folder.name, num_tars, unit="tars") as update:
            problems = check_shards(folder, progress=update)
    for problem in problems:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder}: {len(problems)} problems", markup=False, soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


@shards_app.command("encode")
def shards_encode(
    source: Annotated[str, typer.Argument(help="shards of pictures: a folder or an address")],
    out: Annotated[Path, typer.Argument(help="the folder of shards to write")],
    autoencoder: Annotated[Path | None, typer.Option(help="the run of an autoencoder")] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="a text encoder of transformers: its folder, or its id in the Hugging Face cache"),
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help="where captions stand: txt or json:FIELD; txt if there, json:caption")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="longer captions are cut; 77, or what the encoder takes")
    ] = None,
    captions_optional: Annotated[
        bool, typer.Option("--captions-optional", help="a sample without one has the empty caption")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="samples that are encoded at once")] = 64,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="leave out this share of samples that cannot be read at most")
    ] = 0.0,
) -> None:
    """Encode pictures to latents, captions to embeddings, or both; the same command goes on when stopped.

    Under torchrun, every process takes its share of the shards.
    """
    from ..data.shards import ShardSet
    from ..trainer.encode import Captions, encode

    if text_encoder is None and (caption, max_tokens, captions_optional) != (None, None, False):
        raise ValueError("--caption, --max-tokens and --captions-optional are for --text-encoder; give one")
    captions = Captions(text_encoder, caption, max_tokens, captions_optional) if text_encoder else None
    samples = ShardSet.open(source)
    first = os.environ.get("RANK", "0") == "0"
    console.quiet = not first
    try:
        with progress(out.name, samples.num_samples, unit="samples", shown=first) as update:
            made = encode(
                samples,
                out,
                autoencoder=autoencoder,
                captions=captions,
                batch_size=batch_size,
                max_bad_fraction=max_bad_fraction,
                progress=update,
            )
    except KeyboardInterrupt:
        num_whole = sum((out / name).exists() for name in samples.shards)
        console.print(
            f"stopped with {num_whole} of {len(samples.shards)} shards in {out}; the same command goes on",
            soft_wrap=True,
        )
        raise
    _print_shards(made)
    if left_out := made.info.get("left_out"):
        console.print(f"{left_out['number']} samples were left out, such as {left_out['names'][0]}")


def _print_shards(shards: Any) -> None:
    console.print(
        f"{shards.folder}: {shards.num_samples} samples in {len(shards.shards)} shards, "
        f"members {', '.join(shards.extensions)}, fingerprint {shards.fingerprint[:12]}"
    )
