"""A check names every bad sample, a repair writes what follows from the tars anew, and touches no tar."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from bad_server import PATIENT, serving
from driftmap.data.check import check_remote, check_shards
from driftmap.data.index import index_path
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Reader
from driftmap.data.repair import repair_shards
from driftmap.data.shards import ShardSet, ShardWriter, index_shards, write_dataset_card
from driftmap.launch.cli import app

INFO = {"classes": ["a", "b", "c"]}


def points(number):
    return npy_bytes(np.full(4, number, np.float32))


def write(folder, *, info=INFO, start=0, members=points, extension="points.npy"):
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(start, start + 10):
            writer.write(f"k{number}", {extension: members(number), "cls": b"%d" % (number % 3)})
    return index_shards(folder, info=info, licence="MIT")


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "set")


def tars(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def replace_member(folder, tar, old, new):
    """Change bytes of a tar without changing its size, as a disk or a careless copy does."""
    data = (folder / tar).read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    (folder / tar).write_bytes(data.replace(old, new))


# What a check finds


def test_a_changed_byte_is_named_and_never_repaired(shards):
    replace_member(shards.folder, "shard-000001.tar", points(5), points(6)[:-4] + points(5)[-4:])
    line = (
        "shard-000001.tar: k5: points.npy has changed since it was indexed (checksum); copy the shard again"
    )
    assert check_shards(shards.folder) == [line]
    assert repair_shards(shards.folder) == []
    assert check_shards(shards.folder) == [line]


def test_labels_outside_the_classes_of_the_card_are_named(tmp_path):
    shards = write(tmp_path, info={"classes": ["a", "b"]})
    lines = check_shards(shards.folder)
    assert lines == [
        f"shard-00000{number // 4}.tar: k{number}: cls is 2, but dataset.json names 2 classes, counted from 0"
        for number in (2, 5, 8)
    ]


def test_fields_that_label_samples_have_to_be_in_the_lists_of_the_card(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for key, style in [("a", 1), ("b", 2), ("c", "flat"), ("d", "round"), ("e", None)]:
            fields = {"caption": "x"} if style is None else {"style": style}
            writer.write(key, {"points.npy": points(0), "json": json.dumps(fields).encode()})
    index_shards(tmp_path, info={"styles": ["flat", "glossy"]})
    assert check_shards(tmp_path) == [
        f"shard-000000.tar: {key}: style is {style!r}; expected a number below 2, or one of flat, glossy"
        for key, style in [("b", 2), ("d", "round")]
    ]


def test_latents_are_decoded_as_a_run_would(tmp_path):
    moments = npy_bytes(np.zeros((2, 1, 2, 2), np.float16))
    broken = {1: npy_bytes(np.zeros((3, 1, 2, 2), np.float16)), 2: npy_bytes(np.full((2, 1, 2, 2), np.nan))}
    shards = write(tmp_path, members=lambda number: broken.get(number, moments), extension="moments.npy")
    assert check_shards(shards.folder) == [
        "shard-000000.tar: k1: moments.npy is float16 (3, 1, 2, 2); expected float (2, C, H, W)",
        "shard-000000.tar: k2: moments.npy: the array holds numbers that are not finite",
    ]


def test_an_index_of_another_tar_of_the_same_size_is_noticed(tmp_path, shards):
    other = write(tmp_path / "other", start=20)
    shutil.copy(index_path(other.folder / "shard-000000.tar"), shards.folder)
    (line, *_) = check_shards(shards.folder)
    assert line.startswith("shard-000000.tar: its index is that of another tar of the same size; run")


def test_a_card_that_is_wrong_is_noticed(shards):
    card = shards.folder / "dataset.json"
    said = json.loads(card.read_text())
    for name, value in [("fingerprint", "0" * 64), ("labels", {"0": 10}), ("extensions", ["cls"])]:
        card.write_text(json.dumps(said | {name: value}))
        (line,) = check_shards(shards.folder)
        assert line.startswith(f"{card} is wrong about the {name} of its shards; run `driftmap shards check")
    write_dataset_card(shards.folder, INFO, licence="MIT")
    assert check_shards(shards.folder) == []


def test_pictures_of_several_kinds_are_no_problem_but_a_missing_one_is(tmp_path):
    one = points(1)
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"npy": one, "txt": b"x"})
        writer.write("b", {"npy": one})
    index_shards(tmp_path)
    assert check_shards(tmp_path) == [
        "shard-000000.tar: b: has no txt, which other samples of the shard have"
    ]


# What a repair does


def lose(path, shards):
    path.unlink()


def damage(path, shards):
    path.write_bytes(path.read_bytes()[:-50])


def confuse(path, shards):
    other = write(shards.folder.parent / "other", start=20)
    shutil.copy(index_path(other.folder / "shard-000001.tar"), path)


@pytest.mark.parametrize("harm", [lose, damage, confuse])
def test_a_bad_index_is_written_anew(shards, harm):
    path = index_path(shards.folder / "shard-000001.tar")
    harm(path, shards)
    before = tars(shards.folder)
    assert check_shards(shards.folder)
    (line,) = repair_shards(shards.folder)
    assert line.startswith("shard-000001.idx: written, as it was ")
    assert check_shards(shards.folder) == []
    assert ShardSet.open(shards.folder) == shards
    assert tars(shards.folder) == before
    assert repair_shards(shards.folder) == []


def test_a_tar_that_was_replaced_gets_its_index_and_keeps_the_card(tmp_path, shards):
    other = write(tmp_path / "other", start=20, members=lambda number: points(number) + bytes(600))
    shutil.copy(other.folder / "shard-000002.tar", shards.folder)
    lines = repair_shards(shards.folder)
    assert [line.partition(":")[0] for line in lines] == ["shard-000002.idx", "dataset.json"]
    assert "what it says of classes and origin is kept" in lines[1]
    repaired = ShardSet.open(shards.folder)
    assert (repaired.info, repaired.licence) == (INFO, "MIT")
    assert repaired.fingerprint != shards.fingerprint
    assert Reader(repaired).key(9) == "k29"


@pytest.mark.parametrize("content", [None, b"{", b"[1]"])
def test_a_card_that_is_gone_is_written_with_what_is_known(shards, content):
    card = shards.folder / "dataset.json"
    card.unlink() if content is None else card.write_bytes(content)
    (line,) = repair_shards(shards.folder)
    assert line.startswith(
        "dataset.json: written; names of classes, licence and origin are not known any more"
    )
    repaired = ShardSet.open(shards.folder)
    assert (repaired.fingerprint, repaired.info) == (shards.fingerprint, {})
    if content is not None:
        assert (shards.folder / "dataset.json.damaged").read_bytes() == content


def test_the_card_of_latents_is_not_guessed(tmp_path):
    """Without it nobody knows their scale, and a run would train on the wrong one."""
    moments = npy_bytes(np.zeros((2, 1, 2, 2), np.float16))
    shards = write(tmp_path, members=lambda number: moments, extension="moments.npy")
    (tmp_path / "dataset.json").unlink()
    assert repair_shards(shards.folder) == []
    (line,) = check_shards(shards.folder)
    assert (
        "has no dataset.json that can be read" in line and "copy it from where these shards came from" in line
    )


def test_what_cannot_be_repaired_is_left_and_named(shards):
    os.truncate(shards.folder / "shard-000001.tar", 2000)
    foreign = index_path(shards.folder / "shard-000002.tar")
    foreign.write_text("wids 1")
    index_path(shards.folder / "shard-000000.tar").unlink()
    assert repair_shards(shards.folder) == ["shard-000000.idx: written, as it was missing"]
    lines = check_shards(shards.folder)
    assert foreign.read_text() == "wids 1"
    assert any(
        "shard-000001.tar is cut off or damaged" in line and "Copy or write it again" in line
        for line in lines
    )
    assert any(f"{foreign} was written by another program; move it away" in line for line in lines)


def test_an_encoding_that_was_stopped_gets_no_card(shards):
    (shards.folder / "encoding.json").write_text("{}")
    (shards.folder / "dataset.json").unlink()
    assert repair_shards(shards.folder) == []
    (line,) = check_shards(shards.folder)
    assert line.endswith("what makes these shards was stopped; run the same command again")


def test_the_command_repairs_and_tells(shards):
    def check(*arguments):
        done = CliRunner().invoke(app, ["shards", "check", *map(str, arguments)])
        return done.exit_code, done.output

    index_path(shards.folder / "shard-000000.tar").unlink()
    code, told = check(shards.folder)
    assert code == 1
    assert "shard-000000.tar has no index" in told
    code, told = check(shards.folder, "--repair")
    assert code == 0, told
    assert "shard-000000.idx: written, as it was missing" in told
    assert "0 problems" in told
    address = "http://127.0.0.1:9/x"
    with pytest.raises(ValueError, match="repair the folder where it is stored"):
        CliRunner().invoke(app, ["shards", "check", address, "--repair"], catch_exceptions=False)


# Behind an address


def test_a_set_behind_an_address_is_checked_as_a_local_one(tmp_path, shards):
    with serving(shards.folder, faulty=True) as server:
        opened = ShardSet.open(server.address, cache=tmp_path / "cache", **PATIENT)
        done = []
        assert check_remote(opened, progress=done.append) == []
        assert done == [1, 2, 3]
        replace_member(shards.folder, "shard-000001.tar", points(5), points(6)[:-4] + points(5)[-4:])
        os.truncate(shards.folder / "shard-000002.tar", 2000)
        lines = check_remote(opened)
    assert lines[0].startswith("shard-000001.tar: k5: points.npy has changed since it was indexed")
    assert lines[1].startswith(f"{server.address}/shard-000002.tar could not be read in 12 tries")
    assert len(lines) == 2
