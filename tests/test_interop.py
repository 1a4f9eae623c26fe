"""Other programs read our shards, and we read theirs as they are; what we cannot read is explained."""

import io
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from driftmap.data.batch import ordered
from driftmap.data.decode import find_decoder
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardWriter, index_shards


def picture(value=0, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def samples_of(shards):
    reader = Reader(shards)
    found = [reader.read(number) for number in range(shards.num_samples)]
    return {sample.key: sample.members for sample in found}


def pack(tar, members):
    """Let GNU tar pack files in this very order."""
    with tempfile.TemporaryDirectory() as files:
        for name, data in members:
            (Path(files) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(files) / name).write_bytes(data)
        names = [name for name, _ in members]
        subprocess.run(["tar", "-cf", str(tar), "-C", files, *names], check=True)


# Others read ours


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Shards as Driftmap writes and indexes them: pictures, captions, classes, latents."""
    folder = tmp_path_factory.mktemp("ours")
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for number in range(5):
            members = {"png": picture(number), "cls": b"%d" % (number % 3), "txt": b"picture %d" % number}
            members |= {"json": b'{"style": %d}' % number}
            members |= {"moments.npy": npy_bytes(np.full((2, 1, 2, 2), number, np.float16))}
            writer.write(f"folder/s{number}", members)
    return index_shards(folder)


def test_webdataset_decodes_ours_by_default(ours):
    tars = [str(ours.folder / name) for name in ours.shards]
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [f"folder/s{number}" for number in range(5)]
    for number, sample in enumerate(found):
        assert sample["png"].getpixel((0, 0)) == (number, 0, 0)
        assert (sample["cls"], sample["txt"], sample["json"]) == (
            number % 3,
            f"picture {number}",
            {"style": number},
        )
        assert sample["moments.npy"].dtype == np.float16
        assert np.array_equal(sample["moments.npy"], np.full((2, 1, 2, 2), number))


@pytest.mark.parametrize("source", ["webdataset", "folder"])
def test_datasets_loads_ours_offline(source, ours, tmp_path):
    code = """
    import json, sys, datasets
    source, folder = sys.argv[1:]
    files = {"data_files": {"train": f"{folder}/*.tar"}} if source == "webdataset" else {}
    found = datasets.load_dataset(folder if source == "folder" else source, split="train", **files)
    print(json.dumps([{**row, "png": row["png"].getpixel((0, 0)), "__url__": ""} for row in found]))
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", textwrap.dedent(code), source, str(ours.folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        {
            "__key__": f"folder/s{number}",
            "__url__": "",
            "png": [number, 0, 0],
            "cls": number % 3,
            "txt": f"picture {number}",
            "json": {"style": number},
            "moments.npy": np.full((2, 1, 2, 2), float(number)).tolist(),
        }
        for number in range(5)
    ]


# We read others


def test_what_webdatasets_writer_writes(tmp_path):
    moments = np.random.default_rng(0).standard_normal((3, 2, 1, 2, 2)).astype(np.float16)
    with webdataset.ShardWriter(str(tmp_path / "theirs-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            members = {"moments.npy": moments[number], "json": {"caption": "x"}, "cls": number}
            writer.write({"__key__": f"a/b{number}", **members})
    shards = index_shards(tmp_path)
    assert (shards.counts, shards.labels) == ((2, 1), {0: 1, 1: 1, 2: 1})
    assert Reader(shards).read(2).key == "a/b2"
    assert Reader(shards).read(2).members["json"] == b'{"caption": "x"}'
    (batch,) = ordered(shards, 3)
    assert batch["label"].tolist() == [0, 1, 2]
    assert np.array_equal(batch["mean"].numpy(), moments[:, 0])
    assert np.array_equal(batch["std"].numpy(), moments[:, 1])


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar"])
def test_what_gnu_tar_packs(tmp_path, form):
    files = tmp_path / "files" / ("long" * 20) / "förder"
    files.mkdir(parents=True)
    name = "n" * 60  # with its folders too long for one field of a header
    (files / f"{name}.png").write_bytes(picture(9))
    (files / f"{name}.cls").write_bytes(b"4")
    (files / "other.PNG").write_bytes(picture(8))
    (files / "link.png").symlink_to("other.PNG")
    (files / "LICENSE").write_bytes(b"no member of any sample")
    (files / ".hidden.png").write_bytes(b"nor this")
    out = tmp_path / "out"
    out.mkdir()
    command = ["tar", f"--format={form}", "-cf", str(out / "a.tar"), "-C", str(tmp_path / "files"), "."]
    subprocess.run(command, check=True)
    found = samples_of(index_shards(out))
    prefix = f"./{'long' * 20}/förder"
    assert found == {
        f"{prefix}/{name}": {"png": picture(9), "cls": b"4"},
        f"{prefix}/other": {"png": picture(8)},
    }
    theirs = webdataset.WebDataset(str(out / "a.tar"), shardshuffle=False)
    # WebDataset takes a hidden file for a sample without a name.
    assert {sample["__key__"] for sample in theirs} - {f"{prefix}/"} == set(found)


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_names_longer_than_any_header(tmp_path, form):
    name = "/".join(["folder" * 20] * 3)  # 362 bytes; ustar has room for 255
    (tmp_path / "files" / name).parent.mkdir(parents=True)
    (tmp_path / "files" / f"{name}.png").write_bytes(picture(3))
    command = ["tar", f"--format={form}", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path / "files"), "."]
    subprocess.run(command, check=True)
    assert samples_of(index_shards(tmp_path)) == {f"./{name}": {"png": picture(3)}}


def test_what_img2dataset_leaves(tmp_path):
    """Its layout, by its documentation: tar, table and statistics a shard; jpg, json and txt a sample."""
    for shard in range(2):
        stem, rows, members = f"{shard:05d}", [], []
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            row = {"key": key, "caption": f"picture {number}", "status": "success", "width": 4, "height": 4}
            rows.append(row)
            members += [
                (f"{key}.jpg", picture(40 * number, "JPEG")),
                (f"{key}.json", json.dumps(row).encode()),
                (f"{key}.txt", row["caption"].encode()),
            ]
        pack(tmp_path / f"{stem}.tar", members)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{stem}.parquet")
        (tmp_path / f"{stem}_stats.json").write_text(json.dumps({"count": 3, "successes": 3}))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    shards = index_shards(tmp_path)
    assert (shards.counts, shards.extensions) == ((3, 3), ("jpg", "json", "txt"))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    found = samples_of(shards)
    assert list(found) == [f"0000{shard}000{number}" for shard in range(2) for number in range(3)]
    assert found["000010002"]["txt"] == b"picture 2"
    (batch,) = ordered(shards, 6)
    # JPEG changes a colour by a little.
    reds = (batch["data"][:, 0].mean(dim=(1, 2)) + 1) * 127.5
    assert reds.round().tolist() == pytest.approx([0, 40, 80] * 2, abs=2)


# What is unusual in them


def test_a_key_ends_at_the_first_dot_as_webdatasets_does(tmp_path):
    names = ["v1.0/a.png", "b.seg.png", "b.png", "scan.2024.05.png"]
    pack(tmp_path / "x.tar", [(name, picture()) for name in names])
    shards = index_shards(tmp_path)
    found = {key: set(members) for key, members in samples_of(shards).items()}
    assert found == {"v1.0/a": {"png"}, "b": {"seg.png", "png"}, "scan": {"2024.05.png"}}
    theirs = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    assert found == {
        sample["__key__"]: {name for name in sample if not name.startswith("__")} for sample in theirs
    }


def test_names_full_of_dots_are_explained(tmp_path):
    pack(tmp_path / "x.tar", [(f"scan.{number}.png", picture()) for number in range(100)])
    shards = index_shards(tmp_path)
    assert shards.counts == (1,)
    message = (
        r"has the members 0\.png, 1\.png, 10\.png, .* and 90 more; .* a file's name ends at its first dot"
    )
    with pytest.raises(ValueError, match=message):
        find_decoder(shards)


def test_members_of_a_sample_may_lie_apart(tmp_path):
    order = [
        ("a.png", picture(1)),
        ("b.png", picture(2)),
        ("b.seg.png", picture(3)),
        ("a.cls", b"1"),
        ("b.cls", b"2"),
    ]
    pack(tmp_path / "x.tar", order)
    assert samples_of(index_shards(tmp_path)) == {
        "a": {"png": picture(1), "cls": b"1"},
        "b": {"png": picture(2), "seg.png": picture(3), "cls": b"2"},
    }


# Kinds of addresses


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("s3://bucket/shards", "s3fs", "s3"),
        ("gs://bucket/shards", "gcsfs", "gs"),
        ("hf://datasets/lab/shards", "huggingface_hub", "hf"),
        ("https://host/shards", "aiohttp", "remote"),
    ],
)
def test_an_address_names_the_extra_that_opens_it(address, package, extra, tmp_path):
    code = """
    import sys
    address, package, cache = sys.argv[1:]
    sys.modules[package] = None  # as if it were not installed
    from driftmap.data.shards import ShardSet
    try:
        ShardSet.open(address, cache=cache)
    except ValueError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), address, package, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.startswith(f"{address} cannot be opened: ")
    assert package in told
    assert told.endswith(f"; run `pip install 'driftmap[{extra}]'`\n")
