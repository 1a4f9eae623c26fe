"""Each of these broken inputs gives its message (which file or sample, what to do) and loses nothing.

Elsewhere are a disk that is full (test_shards.py, test_checkpoints.py, of a cache test_faults.py), a tar cut
at any byte and a writer that is killed (test_shards.py), tables and packages (test_sources.py), a server that
fails (test_remote.py), an autoencoder that is not that of the latents (test_mistakes.py).
"""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from driftmap.data.check import check_shards
from driftmap.data.decode import Pixels
from driftmap.data.encode import encode_shards
from driftmap.data.encoders import Encoding, PictureEncoder
from driftmap.data.index import load_index
from driftmap.data.making import make_shards
from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardSet, ShardWriter, index_shards, write_shard
from driftmap.data.sources import Request, find_source
from driftmap.trainer.build import train
from driftmap.trainer.recipe import recipe_from
from runs import tree

NUM_SAMPLES = 20
BAD = 13  # in the second of two shards
TAR = "shard-000001.tar"


@dataclass(frozen=True)
class Case:
    """What is broken, how it is used then, and the message."""

    name: str
    broken: Callable[[Path], object]  # writes a data set into a folder
    used: Callable[[Path], object]
    message: str


# Data sets


def points(number):
    return {"points.npy": npy_bytes(np.float32([number, 1])), "cls": b"%d" % (number % 3)}


def picture(mode="L", form="PNG", value=0):
    buffer = io.BytesIO()
    Image.new(mode, (16, 16), value).save(buffer, form)
    return buffer.getvalue()


def half_a_picture():
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 80).save(buffer, "PNG")
    return buffer.getvalue()[:200]


def pictures(number):
    return {"png": picture(value=number), "cls": b"%d" % (number % 3)}


def write(folder, members=points, **bad):
    """Write and index a data set; `bad` are members of one sample in place of its good ones, or None."""
    with ShardWriter(folder, samples_per_shard=10) as writer:
        for number in range(NUM_SAMPLES):
            found = members(number) | (
                {name.replace("_", "."): data for name, data in bad.items()} if number == BAD else {}
            )
            writer.write(f"k{number:02d}", {name: data for name, data in found.items() if data is not None})
    return index_shards(folder)


def with_bad(members=points, **bad):
    return lambda folder: write(folder, members, **bad)


def with_changed(change, name=TAR):
    """Write a good data set, then change the bytes of one file of it."""

    def broken(folder):
        write(folder)
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return broken


def without(name):
    def broken(folder):
        write(folder)
        (folder / name).unlink()

    return broken


def flip(folder):
    write(folder)
    index = load_index(folder / TAR)
    data = bytearray((folder / TAR).read_bytes())
    data[int(index.offsets[BAD - 10, index.extensions.index("points.npy")]) + 130] ^= 1
    (folder / TAR).write_bytes(data)


def another_tar(folder):
    """Put the tar of other samples, of another size or of the same one, in place of one that was indexed."""
    write(folder)
    (folder / TAR).unlink()
    write_shard(folder / TAR, ((f"k{n:02d}", points(n)) for n in range(10, 17)))
    card = json.loads((folder / "dataset.json").read_text())
    card["shards"][1]["bytes"] = (folder / TAR).stat().st_size
    (folder / "dataset.json").write_text(json.dumps(card))


def other_samples(folder):
    write(folder)
    (folder / TAR).unlink()
    write_shard(folder / TAR, ((f"j{n:02d}", points(n)) for n in range(10, 20)))


def twice(folder):
    folder.mkdir()
    with tarfile.open(folder / TAR, "w") as tar:
        for data in (b"1", b"2"):
            member = tarfile.TarInfo("k00.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(data))


def same_keys(folder):
    for shard in range(2):
        write_shard(folder / f"{shard}.tar", ((f"k{n:02d}", points(n)) for n in range(3)))
    index_shards(folder)


def another_name(folder):
    write(folder)
    card = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(card.replace(TAR, "shard-000007.tar"))


def text_index(folder):
    write(folder)
    (folder / "shard-000001.idx").write_text("v1.2 5\n")


def files(**contents):
    """Write pictures to make shards of."""

    def broken(folder):
        folder.mkdir()
        for name, data in contents.items():
            (folder / name.replace("_", ".")).write_bytes(data)

    return broken


# Uses


def trained(folder):
    """Train for an epoch on what lies in a folder."""
    extensions = ShardSet.open(folder).extensions
    if "png" in extensions:
        model, objective = {"name": "convnet", "width": 8, "num_classes": 3}, "classifier"
    else:
        model, objective = (
            {"name": "mlp", "channels": 2, "width": 4, "depth": 1, "num_classes": 3},
            "flow_matching",
        )
    settings = {
        "data": {"shards": str(folder), "batch_size": 4},
        "model": model,
        "objective": {"name": objective},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 5, "save_every": 1},
    }
    train(recipe_from(settings), folder.with_name("run"))


def checked(folder):
    if problems := check_shards(folder):
        raise ValueError("\n".join(problems))


def made(folder):
    make_shards(find_source(str(folder), Request(size=8)), folder.with_name("made"))


def encoded_by_another(folder):
    def encode(version):
        def moments(pixels):
            return pixels[:, :, ::2, ::2], torch.ones_like(pixels[:, :, ::2, ::2])

        encoding = Encoding(
            PictureEncoder(moments, Pixels()), {"encoder": version}, lambda: {"encoder": version}
        )
        return encode_shards(ShardSet.open(folder), folder / "latents", [encoding])

    if not (folder / "latents").exists():
        encode("first")
    encode("second")


READ = rf"{TAR}: k{BAD}: "
CHECK = r".*`driftmap shards check \S+broken` names every such sample"
CASES = [
    Case(
        "bytes that are no picture",
        with_bad(pictures, png=b"no picture"),
        trained,
        READ + "the 10 bytes are no picture" + CHECK,
    ),
    Case(
        "half a picture",
        with_bad(pictures, png=half_a_picture()),
        trained,
        READ + "the .* no whole picture" + CHECK,
    ),
    Case(
        "a picture of 16 bits",
        with_bad(pictures, png=picture("I;16")),
        trained,
        READ + "the picture has mode I;16; expected 8 bits a channel: convert it",
    ),
    Case(
        "half an array",
        with_bad(points_npy=points(0)["points.npy"][:-1]),
        trained,
        READ + r"the array says float32 \(2,\) but holds 7 bytes" + CHECK,
    ),
    Case(
        "no array",
        with_bad(points_npy=b"hello"),
        trained,
        READ + "the 5 bytes are no array of numbers" + CHECK,
    ),
    Case(
        "a number that is none",
        with_bad(points_npy=npy_bytes(np.float32([0, np.nan]))),
        trained,
        READ + "it holds numbers that are not finite; write the sample again",
    ),
    Case(
        "an infinite number",
        with_bad(points_npy=npy_bytes(np.float32([0, np.inf]))),
        trained,
        READ + "it holds numbers that are not finite; write the sample again",
    ),
    Case(
        "another shape",
        with_bad(points_npy=npy_bytes(np.float32([0, 1, 2]))),
        trained,
        rf"k\d\d has shape \(\d,\) but {TAR}: k\d\d has \(\d,\)" + CHECK,
    ),
    Case(
        "no label",
        with_bad(cls=None),
        trained,
        READ + "there is no cls, which other samples of the data set have" + CHECK,
    ),
    Case(
        "a label that is no number",
        with_bad(cls=b"cat"),
        trained,
        READ + "cls is b'cat'; expected the number of a class" + CHECK,
    ),
    Case(
        "a label of no class",
        with_bad(cls=b"7"),
        trained,
        r"the model has num_classes 3, but \S+broken holds the class 7; .* set it to 8 or more",
    ),
    Case(
        "a changed byte",
        flip,
        trained,
        READ + r"points\.npy has changed since it was indexed \(checksum\); copy the shard again",
    ),
    Case(
        "a missing shard",
        without(TAR),
        trained,
        rf"{TAR} is only in one of \S+broken and its dataset\.json; run `driftmap shards index",
    ),
    Case(
        "a shard cut after it was indexed",
        with_changed(lambda data: data[:-600]),
        trained,
        rf"{TAR} has \d+ bytes but dataset\.json says \d+; .*copy it again",
    ),
    Case(
        "a shard cut before",
        with_changed(lambda data: data[:5000]),
        index_shards,
        rf"{TAR} is cut off or damaged: .*Copy or write it again",
    ),
    Case(
        "an empty file",
        with_changed(lambda data: b""),
        index_shards,
        rf"{TAR} is empty; copy or write it again, or delete it",
    ),
    Case(
        "a compressed shard",
        with_changed(gzip.compress),
        index_shards,
        rf"{TAR} is no plain tar .*; compressed tars must be unpacked",
    ),
    Case(
        "a member twice",
        twice,
        index_shards,
        rf"{TAR} holds k00\.cls twice; remove one of them and pack the tar again",
    ),
    Case("the same keys in two shards", same_keys, checked, r"1\.tar: k00: the same key is in 0\.tar"),
    Case(
        "no index",
        without("shard-000001.idx"),
        trained,
        rf"{TAR} has no index; run `driftmap shards index \S+broken`",
    ),
    Case(
        "the index of another tar",
        another_tar,
        trained,
        rf"{TAR} has \d+ bytes but its index was made for \d+; .*run `driftmap shards index",
    ),
    Case(
        "the index of another tar of one size",
        other_samples,
        checked,
        rf"{TAR}: its index is that of another tar .*run `driftmap shards check \S+ --repair`",
    ),
    Case(
        "an index of another program",
        text_index,
        index_shards,
        r"shard-000001\.idx was written by another program; move it away",
    ),
    Case(
        "a damaged index",
        with_changed(lambda data: data[:200], "shard-000001.idx"),
        trained,
        r"shard-000001\.idx is damaged .*; delete it, then run `driftmap shards index",
    ),
    Case(
        "no card",
        without("dataset.json"),
        trained,
        r"broken has no dataset\.json, so it is not complete; run `driftmap shards index",
    ),
    Case(
        "a card that is no JSON",
        with_changed(lambda data: data[:50], "dataset.json"),
        trained,
        r"dataset\.json is no JSON .*; run `driftmap shards check \S+broken --repair`",
    ),
    Case(
        "a card that lacks what it should say",
        with_changed(lambda data: b'{"format": 1}', "dataset.json"),
        trained,
        r"dataset\.json .*; run `driftmap shards",
    ),
    Case(
        "a card of other shards",
        another_name,
        trained,
        r"shard-00000[17]\.tar is only in one of \S+broken and its dataset\.json; run",
    ),
    Case(
        "a broken file among pictures",
        files(a_png=picture(), b_png=b"\x89PNG hello"),
        made,
        r"b\.png: the 10 bytes are no picture of a known kind.*; remove it or replace it",
    ),
    Case(
        "a picture of floats",
        files(a_tiff=picture("F", "TIFF", 0.5)),
        made,
        r"a\.tiff: .*mode F .*; expected 8 or 16 bits",
    ),
    Case(
        "latents of another encoder",
        lambda folder: write(folder, pictures),
        encoded_by_another,
        r"latents .*Choose another folder",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_input_is_told_and_nothing_is_lost(case, tmp_path):
    folder = tmp_path / "broken"
    case.broken(folder)
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match=case.message):
        case.used(folder)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    folder = tmp_path / "kept"
    write(folder)
    (folder / "shard-000001.idx").unlink()
    before = tree(folder)
    folder.chmod(0o500)
    try:
        message = r"cannot write \S+shard-000001\.idx: .* that you may write to it"
        with pytest.raises(PermissionError, match=message):
            index_shards(folder)
    finally:
        folder.chmod(0o700)
    assert tree(folder) == before
