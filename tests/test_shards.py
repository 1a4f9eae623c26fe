"""Shards are ordinary WebDataset tars; they are whole or absent, and a damaged one is explained in words."""

import errno
import io
import json
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from driftmap.data.check import check_shards
from driftmap.data.index import build_index, load_index
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardSet, ShardWriter, index_shards, write_atomically, write_dataset_card


def png(value=0):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, num_samples=5, **settings):
    with ShardWriter(folder, **settings) as writer:
        for number in range(num_samples):
            writer.write(f"s{number:03d}", {"png": png(number), "cls": str(number % 3).encode()})
    return folder


def start_python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pack(path, members):
    """Write a tar with the members in this very order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# What is written


def test_what_is_written_is_read(tmp_path):
    shards = index_shards(write(tmp_path, 5, samples_per_shard=2))
    assert shards.shards == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert shards.counts == (2, 2, 1)
    assert shards.extensions == ("cls", "png")
    assert shards.labels == {0: 2, 1: 2, 2: 1}
    reader = Reader(shards)
    for number in range(5):
        sample = reader.read(number)
        assert (sample.key, sample.shard) == (f"s{number:03d}", shards.shards[number // 2])
        assert sample.members == {"png": png(number), "cls": str(number % 3).encode()}
        assert reader.key(number) == sample.key
    assert check_shards(tmp_path) == []


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    tar = "shard-000000.tar"
    assert (first / tar).read_bytes() == (second / tar).read_bytes()
    assert index_shards(first).fingerprint == index_shards(second).fingerprint


def test_the_fingerprint_follows_content_alone(tmp_path):
    before = index_shards(write(tmp_path / "a")).fingerprint
    copy = (tmp_path / "a").rename(tmp_path / "b")
    (copy / "shard-000000.tar").touch()
    assert index_shards(copy).fingerprint == before
    with ShardWriter(tmp_path / "c") as writer:
        for number in range(5):
            writer.write(f"s{number:03d}", {"png": png(number), "cls": b"0"})
    assert index_shards(tmp_path / "c").fingerprint != before


def test_indexing_again_keeps_what_the_card_says(tmp_path):
    index_shards(write(tmp_path))
    write_dataset_card(tmp_path, {"classes": ["a", "b", "c"]}, licence="CC0-1.0", source="here")
    (tmp_path / "shard-000000.idx").unlink()
    shards = index_shards(tmp_path)
    assert (shards.info, shards.licence, shards.source) == ({"classes": ["a", "b", "c"]}, "CC0-1.0", "here")
    assert ShardSet.open(tmp_path) == shards


# Mistakes: more of them are in test_broken_inputs.py


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("a.b", {"png": b"x"}, "'a.b' is no WebDataset key"),
        ("", {"png": b"x"}, "'' is no WebDataset key"),
        ("/a", {"png": b"x"}, "'/a' is no WebDataset key"),
        ("../a", {"png": b"x"}, "'../a' is no WebDataset key"),
        ("s000", {"png": b"x"}, "'s000' is written twice"),
        ("a", {}, "sample 'a' has no members"),
        ("a", {"png": b""}, "sample 'a': member 'png' is empty"),
        ("a", {".png": b"x"}, "sample 'a' has a member called '.png'"),
        ("a", {"PNG": b"x"}, "sample 'a' has a member called 'PNG'"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_refused(tmp_path, key, members, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")), ShardWriter(tmp_path) as writer:
        writer.write("s000", {"png": b"x"})
        writer.write(key, members)
    assert list(tmp_path.iterdir()) == []


def test_a_dot_in_a_folder_is_no_trouble(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("v1.0/a", {"png": png()})
    assert Reader(index_shards(tmp_path)).key(0) == "v1.0/a"


def test_finished_shards_are_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000\.tar exists already"):
        ShardWriter(tmp_path)


def test_an_exception_leaves_finished_shards_alone(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(3):
            writer.write(str(number), {"png": png()})
        raise KeyError("in the middle of the second shard")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    whole = (write(tmp_path / "whole") / "shard-000000.tar").read_bytes()
    index_shards(tmp_path / "whole")
    index = load_index(tmp_path / "whole" / "shard-000000.tar")
    cls_ends, png_ends = (index.offsets + index.sizes).T
    cut = tmp_path / "cut.tar"
    for size in range(700, int(cls_ends[-1]) + 512, 111):
        cut.write_bytes(whole[:size])
        complete = np.sum(cls_ends <= size) if np.sum(png_ends <= size) > 1 else 0
        with pytest.raises(
            ValueError, match=rf"cut\.tar is cut off or damaged: .*first {complete} samples are"
        ):
            build_index(cut)
    assert not (tmp_path / "cut.idx").exists()


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    tar = write(tmp_path) / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b"s003.png")
    data[place : place + 4] = b"oops"
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=f"no end mark at byte {place}; its first 3 samples are whole"):
        build_index(tar)


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        ShardSet.open(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no \.tar file"):
        ShardSet.open(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed: unpack it"):
        ShardSet.open(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is no plain tar"):
        index_shards(tmp_path)


def test_a_folder_that_changed_since_it_was_indexed(tmp_path):
    write(tmp_path, 4, samples_per_shard=2)
    remedy = f"run `driftmap shards index {tmp_path}`"
    with pytest.raises(ValueError, match=rf"shard-000000\.tar has no index; {remedy}"):
        ShardSet.open(tmp_path)
    build_index(tmp_path / "shard-000000.tar")
    build_index(tmp_path / "shard-000001.tar")
    with pytest.raises(ValueError, match=rf"has no dataset\.json, so it is not complete; {remedy}"):
        ShardSet.open(tmp_path)
    index_shards(tmp_path)
    second = tmp_path / "shard-000001.tar"
    second.write_bytes(second.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=rf"shard-000001\.tar has {second.stat().st_size} bytes but dataset"):
        ShardSet.open(tmp_path)
    index_shards(tmp_path)
    second.rename(tmp_path / "other.tar")
    (tmp_path / "shard-000001.idx").rename(tmp_path / "other.idx")
    with pytest.raises(ValueError, match=r"other\.tar is only in one of"):
        ShardSet.open(tmp_path)


def test_a_tar_of_another_size_is_not_read_by_an_old_index(tmp_path):
    shards = index_shards(write(tmp_path))
    tar = tmp_path / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-000000\.tar has \d+ bytes but its index was made for"):
        Reader(shards).read(0)


def test_a_changed_byte_is_found(tmp_path):
    shards = index_shards(write(tmp_path))
    tar = tmp_path / "shard-000000.tar"
    place = int(load_index(tar).offsets[2, shards.extensions.index("png")])
    data = bytearray(tar.read_bytes())
    data[place + 40] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: s002: png has changed since it was indexed"):
        Reader(shards).read(2)
    assert Reader(shards, verify=False).read(2).key == "s002"
    problem = "shard-000000.tar: s002: png has changed since it was indexed (checksum); copy the shard again"
    assert check_shards(tmp_path) == [problem]


def test_check_names_every_problem(tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(noise, "PNG")
    good = npy_bytes(np.zeros((2, 1, 2, 2), np.float16))
    members = [
        ("a.png", noise.getvalue()[:200]),
        ("b.png", b"no picture"),
        ("c.npy", good[:-1]),
        ("d.npy", npy_bytes(np.array([np.inf]))),
        ("e.json", b"{"),
        ("f.cls", b"seven"),
        ("g.npy", good),
    ]
    for name, data in members:
        pack(tmp_path / f"{name[0]}.tar", [(name, data)])
    pack(tmp_path / "h.tar", [("g.npy", good), ("x.npy", good), ("x.cls", b"1")])
    index_shards(tmp_path)
    (tmp_path / "i.tar.tmp").touch()
    problems = check_shards(tmp_path)
    expected = [
        "i.tar.tmp: left by a writer",
        "a.tar: a: png: the 200 bytes are no whole picture",
        "b.tar: b: png: the 10 bytes are no picture of a known kind",
        "c.tar: c: npy: the array says float16 (2, 1, 2, 2) but holds 15 bytes",
        "d.tar: d: npy: the array holds numbers that are not finite",
        "e.tar: e: json: ",
        "f.tar: f: cls: cls is b'seven'",
        "h.tar: g: has no cls, which other samples of the shard have; the same key is in g.tar",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


# Killed processes and full disks


def test_a_killed_writer_leaves_only_whole_tars(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from driftmap.data.writer import ShardWriter
        with ShardWriter(Path(sys.argv[1]), samples_per_shard=50) as writer:
            for number in range(100_000):
                writer.write(str(number), {"bin": bytes(3000)})
    """
    process = start_python(code, tmp_path)
    try:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("*.tar"))) < 3 or not list(tmp_path.glob("*.tmp")):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    shards = index_shards(tmp_path)
    assert len(shards.counts) >= 3
    assert set(shards.counts) == {50}


def test_a_full_disk_is_explained_and_finished_shards_stay(tmp_path):
    # A limit on the size of a file fails in the same calls as a full disk, with another number.
    code = """
        import resource, sys
        from pathlib import Path
        from driftmap.data.writer import ShardWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with ShardWriter(Path(sys.argv[1]), samples_per_shard=5) as writer:
            for number in range(12):
                try:
                    writer.write(str(number), {"bin": bytes(1000 if number < 10 else 10**6)})
                except OSError as error:
                    print(error.errno, error.strerror)
                    break
    """
    output, errors = start_python(code, tmp_path).communicate(timeout=60)
    number, _, message = output.strip().partition(" ")
    assert int(number) == errno.EFBIG, errors
    assert message == (
        f"cannot write {tmp_path}/shard-000002.tar: File too large; 2 finished shards with 10 samples in "
        f"{tmp_path} are intact, and the unfinished one was removed. "
        "Free some space or raise the quota, then run the same command again."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
    assert index_shards(tmp_path).counts == (5, 5)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    code = """
        import resource, sys
        from pathlib import Path
        from driftmap.data.writer import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_atomically(Path(sys.argv[1]), bytes(5000))
    """
    _, errors = start_python(code, path).communicate(timeout=60)
    message = f"cannot write {path}: File too large; what stood there before is untouched. Free some space"
    assert message in errors
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="Check that the folder exists and that you may write to it"):
        write_atomically(tmp_path / "missing" / "a", b"x")


def test_the_card_is_plain_json(tmp_path):
    index_shards(write(tmp_path), info={"classes": ["a", "b", "c"]}, licence="MIT", source="a test")
    card = json.loads((tmp_path / "dataset.json").read_text())
    assert card["num_samples"] == 5
    assert card["labels"] == {"0": 2, "1": 2, "2": 1}
    assert (card["licence"], card["source"], card["info"]) == ("MIT", "a test", {"classes": ["a", "b", "c"]})
