"""Rows of many samples are read at once: one checksum stands for all, and memory in use is left alone."""

import zlib

import numpy as np
import pytest
import torch

from driftmap.data.checksum import crc_of_rows
from driftmap.data.decode import find_decoder
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Reader
from driftmap.data.room import Room
from driftmap.data.samples import Samples
from driftmap.data.shards import ShardWriter, index_shards

COUNT = 40


def moments(number):
    return np.random.default_rng(number).standard_normal((2, 3, 5, 5)).astype(np.float16)


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=7) as writer:
        for number in range(COUNT):
            writer.write(f"k{number:02d}", {"moments.npy": npy_bytes(moments(number)), "cls": b"1"})
    return index_shards(tmp_path)


@pytest.mark.parametrize("count, size, width", [(1, 5, 5), (3, 100, 512), (7, 512, 512), (64, 700, 1024)])
def test_the_checksum_of_rows_from_those_of_their_members(count, size, width):
    random = np.random.default_rng(0)
    rows = np.zeros((count, width), np.uint8)
    rows[:, :size] = random.integers(0, 256, (count, size))
    crcs = np.array([zlib.crc32(row[:size].data) for row in rows])
    assert crc_of_rows(crcs, size=size, width=width) == zlib.crc32(rows.data)
    crcs[-1] ^= 1
    assert crc_of_rows(crcs, size=size, width=width) != zlib.crc32(rows.data)


@pytest.mark.parametrize("order", [range(COUNT), range(COUNT - 1, -1, -1), [3, 39, 3, 0, 20]])
def test_rows_are_the_members_in_any_order(shards, order):
    numbers = np.array(order)
    rows = Reader(shards).rows(numbers, "moments.npy")
    assert [row.tobytes() for row in rows] == [npy_bytes(moments(number)) for number in order]


@pytest.mark.parametrize("place", ["data", "zeros after it"])
def test_one_changed_byte_is_found_and_named(shards, place):
    reader = Reader(shards)
    index = reader.index(2)
    offset = int(index.offsets[3, index.extensions.index("moments.npy")])
    size = int(index.sizes[3, index.extensions.index("moments.npy")])
    tar = shards.folder / shards.shards[2]
    data = bytearray(tar.read_bytes())
    data[offset + (200 if place == "data" else size)] ^= 4
    tar.write_bytes(data)
    samples, numbers = Samples(shards, find_decoder(shards)), np.arange(COUNT)
    if place == "data":
        with pytest.raises(ValueError, match=r"shard-000002.tar: k17: moments.npy has changed since"):
            samples.batch(numbers, index=numbers)
        return
    # Nothing of the sample has changed: it is read in the way for one sample after another.
    assert Reader(shards).rows(numbers, "moments.npy") is None
    assert samples.batch(numbers, index=numbers)["mean"][17, 0, 0, 0] == moments(17)[0, 0, 0, 0]


def test_memory_is_used_again_when_nobody_holds_it():
    room = Room()
    first = room(1000)
    tensor = torch.from_numpy(first)[10:20]
    address = first.ctypes.data
    del first
    second = room(1000)
    assert second.ctypes.data != address, "a part of a tensor still holds it"
    tensor.fill_(7)
    second[:] = 1
    assert tensor.tolist() == [7] * 10
    del tensor
    assert room(1000).ctypes.data == address
    assert len(room(500)) == 500
