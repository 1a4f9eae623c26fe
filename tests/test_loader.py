"""A run that stops and goes on sees the very next sample, bitwise, on any number of ranks."""

import gc
import io
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from streams import in_order, joined

from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.decode import Moments, Pixels, Points, find_decoder
from driftmap.data.members import npy_bytes, read_pixels
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardWriter, index_shards

COUNTS = (5, 7, 1, 10)


def moments(number, shape=(2, 2, 3)):
    return np.random.default_rng(number).standard_normal((2, *shape)).astype(np.float16)


def write(folder, samples, counts=None):
    """Write samples, in shards of these sizes, and index them."""
    samples = iter(samples)
    for shard, count in enumerate(counts or (10**6,)):
        with ShardWriter(folder, name=f"part{shard}", samples_per_shard=10**6) as writer:
            for key, members in islice(samples, count):
                writer.write(key, members)
    return index_shards(folder)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    samples = (
        (f"k{number:02d}", {"moments.npy": npy_bytes(moments(number)), "cls": str(number % 4).encode()})
        for number in range(sum(COUNTS))
    )
    return write(tmp_path_factory.mktemp("latents"), samples, COUNTS)


def take(shards, num_batches, **settings):
    start = settings.pop("start", 0)
    stream = Stream(**{"batch_size": 6, "seed": 1, "window": 2} | settings)
    with Batches(shards, stream, start=start) as batches:
        return [in_order(next(batches)) for _ in range(num_batches)]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_batch_holds_what_was_written(latents):
    with Batches(latents, Stream(batch_size=4, seed=0)) as batches:
        batch = in_order(next(batches))
        keys = batches.keys_of(batch["index"])
    numbers = [int(key[1:]) for key in keys]
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["label"].tolist() == [number % 4 for number in numbers]
    for row, number in enumerate(numbers):
        mean, std = torch.from_numpy(moments(number)).float()
        assert torch.equal(batch["mean"][row], mean)
        assert torch.equal(batch["std"][row], std)


def test_an_epoch_holds_every_sample_once_and_the_next_begins_inside_a_batch(latents):
    with Batches(latents, Stream(batch_size=4, seed=0)) as batches:
        keys = [key for _ in range(12) for key in batches.keys_of(in_order(next(batches))["index"])]
    assert len(set(keys[:23])) == 23
    assert len(set(keys[23:46])) == 23
    assert keys[:23] != keys[23:46]


@pytest.mark.parametrize("num_before", [1, 3, 4, 9])
def test_going_on_at_the_position_is_exact(latents, num_before):
    whole = take(latents, 12)
    with Batches(latents, Stream(batch_size=6, seed=1, window=2), prefetch=3) as batches:
        for _ in range(num_before):
            next(batches)
        position = batches.position
    assert position == 6 * num_before
    for left, right in zip(whole[num_before:], take(latents, 12 - num_before, start=position), strict=True):
        assert_same(left, right)


def test_any_position_will_do(latents):
    whole = joined(take(latents, 10))
    for start in range(0, 30, 7):
        rest = joined(take(latents, 3, start=start))
        assert_same(rest, {name: values[start : start + 18] for name, values in whole.items()})


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_number_of_ranks_does_not_change_a_global_batch(latents, world):
    whole = take(latents, 5)
    parts = [take(latents, 5, rank=rank, world=world) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert_same(joined(part[number] for part in parts), batch)


def test_another_batch_size_goes_on_with_the_same_samples(latents):
    assert_same(
        joined(take(latents, 6)), joined([*take(latents, 3), *take(latents, 2, batch_size=9, start=18)])
    )


def test_one_pass_in_order(latents):
    batches = list(ordered(latents, 10))
    assert [len(batch["index"]) for batch in batches] == [10, 10, 3]
    assert joined(batches)["index"].tolist() == list(range(23))
    assert torch.equal(joined(batches)["mean"][17], torch.from_numpy(moments(17)[0]).float())


# Decoders


def picture(mode, colour, form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(buffer, form)
    return buffer.getvalue()


def test_pixels(tmp_path):
    samples = [
        ("red", {"png": picture("RGB", (255, 0, 51))}),
        ("clear", {"png": picture("RGBA", (0, 0, 0, 0))}),
        ("grey", {"webp": picture("RGB", (0, 0, 0), "WEBP")}),
    ]
    shards = write(tmp_path, samples)
    assert find_decoder(shards) == Pixels(3, ["png", "webp"])
    data = next(ordered(shards, 3))["data"]
    assert data.shape == (3, 3, 2, 3)
    assert data.dtype == torch.float32
    assert torch.allclose(data[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    assert torch.all(data[1] == 1)
    assert torch.all(data[2] == -1)
    grey = next(ordered(shards, 3, decoder=Pixels(1)))["data"]
    assert grey.shape == (3, 1, 2, 3)


def test_points(tmp_path):
    shards = write(tmp_path, [("a", {"points.npy": npy_bytes(np.array([1.5, -2], np.float32))})])
    assert find_decoder(shards) == Points()
    batch = next(ordered(shards, 1))
    assert batch.keys() == {"index", "data"}
    assert batch["data"].tolist() == [[1.5, -2.0]]


def test_arrays_that_numpy_wrote_in_another_way_are_read_too(tmp_path):
    fortran = npy_bytes(np.asfortranarray(moments(1)))
    double = npy_bytes(moments(1).astype(np.float64))
    versioned = io.BytesIO()
    np.lib.format.write_array(versioned, moments(1), version=(2, 0))
    members = [fortran, double, versioned.getvalue()]
    shards = write(tmp_path, [(str(row), {"moments.npy": data}) for row, data in enumerate(members)])
    assert find_decoder(shards) == Moments()
    mean = next(ordered(shards, 3))["mean"]
    for row in range(3):
        assert torch.equal(mean[row], torch.from_numpy(moments(1)[0]).float())


GOOD = npy_bytes(moments(0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"png": b"no picture"}, r"part0-000000\.tar: bad: the 10 bytes are no picture"),
        ({"png": picture("I;16", 7)}, r"bad: the picture has mode I;16; expected 8 bits a channel"),
        ({"moments.npy": GOOD[:-1]}, r"bad: the array says float16 \(2, 2, 2, 3\) but holds 47 bytes"),
        ({"moments.npy": b"nothing"}, "bad: the 7 bytes are no array of numbers"),
        (
            {"moments.npy": npy_bytes(moments(0)[0])},
            r"bad: moments.npy is float16 \(2, 2, 3\); expected float",
        ),
        ({"moments.npy": npy_bytes(moments(0) * np.inf)}, "bad: it holds numbers that are not finite"),
        ({"moments.npy": GOOD, "cls": b"cat"}, "bad: cls is b'cat'; expected the number of a class"),
        (
            {"points.npy": npy_bytes(np.array([1, 2]))},
            r"bad: points.npy is int64 \(2,\); expected float \(D,\)",
        ),
    ],
)
def test_a_bad_sample_is_named(tmp_path, members, message):
    shards = write(tmp_path, [("bad", members)])
    with Batches(shards, Stream(batch_size=1, seed=0)) as batches:
        for _ in range(2):  # the second time it does not wait for ever
            with pytest.raises(ValueError, match=message):
                next(batches)


def test_samples_of_two_shapes_are_both_named(tmp_path):
    samples = [(str(side), {"moments.npy": npy_bytes(moments(0, (1, side, 2)))}) for side in (2, 3)]
    shards = write(tmp_path, samples)
    with pytest.raises(ValueError, match=r"tar: 2 has shape \(1, 2, 2\) but \S+tar: 3 has \(1, 3, 2\)"):
        next(ordered(shards, 2))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("settings", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (64, 48)])
def test_a_jpeg_is_what_pillow_makes_of_it(mode, settings, size):
    noise = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(file, "JPEG", **settings)
    expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(read_pixels(file.getvalue(), 3), expected)


@pytest.mark.parametrize("keep", [3, 100, 300])
def test_a_jpeg_that_is_cut_off_says_so(keep):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG")
    with pytest.raises(ValueError, match=f"the {keep} bytes are no"):
        read_pixels(file.getvalue()[:keep], 3)


def test_a_missing_label_is_named(tmp_path):
    shards = write(tmp_path, [("a", {"moments.npy": GOOD, "cls": b"1"}), ("b", {"moments.npy": GOOD})])
    with pytest.raises(ValueError, match="b: there is no cls, which other samples of the data set have"):
        next(ordered(shards, 2))


def test_a_data_set_without_anything_to_train_on(tmp_path):
    shards = write(tmp_path, [("a", {"txt": b"words"})])
    with pytest.raises(ValueError, match=r"has the members txt; expected moments\.npy"):
        Batches(shards, Stream(batch_size=1, seed=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world": 2}, "batch_size is 5 over 2 ranks; expected a positive multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "rank": 2, "world": 2}, "rank is 2; expected 0 to 1"),
    ],
)
def test_impossible_streams_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Stream(seed=0, **settings)


# The thread


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "driftmap batches"]


def test_closing_ends_the_thread(latents):
    batches = Batches(latents, Stream(batch_size=2, seed=0))
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    batches.close()
    assert loader_threads() == []
    with pytest.raises(RuntimeError, match="closed; make new ones with start=position"):
        next(batches)


def test_dropping_the_batches_ends_the_thread(latents):
    batches = Batches(latents, Stream(batch_size=2, seed=0))
    next(batches)
    del batches
    gc.collect()
    assert loader_threads() == []


def test_reading_ahead_takes_the_waiting_away(latents):
    with Batches(latents, Stream(batch_size=2, seed=0), prefetch=4) as batches:
        next(batches)
        waited = batches.wait_s
        assert waited > 0
        time.sleep(0.5)
        for _ in range(4):
            next(batches)
        assert batches.wait_s - waited < 0.25


def test_many_readers_of_few_open_shards(latents):
    reader = Reader(latents, max_open=1)

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 23, 300):
            sample = reader.read(int(number))
            assert sample.key == f"k{number:02d}"
            assert sample.members["moments.npy"] == npy_bytes(moments(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_leaving_the_interpreter_does_not_hang(latents):
    code = """
        import sys
        from driftmap.data.batch import Batches, Stream
        from driftmap.data.shards import ShardSet
        batches = Batches(ShardSet.open(sys.argv[1]), Stream(batch_size=2, seed=0))
        print(next(batches)["index"].tolist())
        if len(sys.argv) > 2:
            raise SystemError("with an error too")
    """
    for extra, status in ((), 0), (("fail",), 1):
        command = [sys.executable, "-c", textwrap.dedent(code), str(latents.folder), *extra]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (status, "[0, 1]\n"), done.stderr
