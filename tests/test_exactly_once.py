"""Every sample comes exactly once an epoch, whoever reads it.

However many ranks and workers, whatever the window, from uneven and empty shards, through a stop anywhere and
with another number of ranks after it. Where data sets are mixed, classes balanced, or pictures of several
sizes kept apart, it is so in the epochs of each data set, class and size by itself.
"""

import io
import math
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from driftmap.data import batch as batch_module
from driftmap.data.batch import Batches, Stream
from driftmap.data.joined import join
from driftmap.data.members import npy_bytes
from driftmap.data.order import Mixing
from driftmap.data.reader import Reader
from driftmap.data.shards import index_shards

TIME_LIMIT_S = 30
SIZES = {"tall": (3, 2), "wide": (2, 3), "square": (2, 2)}


def write(folder, counts, members, **info):
    """Write shards of so many samples, numbered through, with what `members` gives of a number."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for _ in range(count):
                for extension, data in members(number).items():
                    header = tarfile.TarInfo(f"{folder.name}{number}.{extension}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                number += 1
    return index_shards(folder, info=info)


def point(number):
    """Sample n of class 0, 1 or 2, of which the last is rare."""
    return {"points.npy": npy_bytes(np.array([number], np.float32)), "cls": str(class_of(number)).encode()}


def class_of(number):
    return 2 if number % 9 == 4 else number % 2


def name_of(key):
    return key.rstrip("0123456789")


def number_of(key):
    return int(key.removeprefix(name_of(key)))


def picture(number, size):
    buffer = io.BytesIO()
    Image.new("L", size[::-1], number).save(buffer, "PNG")
    return {"png": buffer.getvalue()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return data sets by name, with how they are mixed and the groups whose epochs are their own."""
    folder = tmp_path_factory.mktemp("sets")
    uneven = write(folder / "uneven", (5, 0, 7, 1, 0, 10), point)
    other = write(folder / "other", (0, 3, 2), point)
    single = write(folder / "single", (1,), point)
    runs, counts, sizes = [], [], []
    for name, own in (("tall", (4, 0, 3)), ("wide", (2,)), ("square", (9, 1))):
        runs.append([*SIZES[name], sum(own)])
        counts += own
        sizes += [SIZES[name]] * sum(own)
    pictures = write(
        folder / "pictures", counts, lambda number: picture(number, sizes[number]), buckets=runs, channels=1
    )

    return {
        "plain": (uneven, Mixing(), lambda key: ""),
        "one sample": (single, Mixing(), lambda key: ""),
        "mixture": (join([uneven, other, single]), Mixing((3, 1, 0.5)), name_of),
        "balance": (uneven, Mixing(balance=True), lambda key: class_of(number_of(key))),
        "balanced mixture": (
            join([uneven, other]),
            Mixing((1, 2), balance=True),
            lambda key: (name_of(key), class_of(number_of(key))),
        ),
        "buckets": (pictures, Mixing(), lambda key: sizes[number_of(key)]),
    }


@pytest.fixture(scope="module", autouse=True)
def few_positions_at_a_time():
    """Look up few positions ahead, so that a short run crosses the ends of what was looked up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_LOOKED_UP", 50)
        yield


def read(shards, mixing, num_batches, *, world, **stream):
    """Return the keys at the positions of some global batches, as all ranks together see them."""
    start, workers = stream.pop("start", 0), stream.pop("workers")
    ranks = [
        Batches(
            shards,
            Stream(**stream, mixing=mixing, rank=rank, world=world),
            start=start,
            workers=workers,
            prefetch=1,
        )
        for rank in range(world)
    ]
    keys = {}
    for _ in range(num_batches):
        shapes = set()
        for batches in ranks:
            batch = next(batches)
            found = batches.keys_of(batch["index"])
            assert [number_of(key) for key in found] == (batch["data"].flatten(1)[:, 0].long().tolist()), (
                "the content is not that of the sample"
            )
            shapes.add(batch["data"].shape[1:])
            keys.update(zip(batch["index"].tolist(), found, strict=True))
        assert len(shapes) == 1, "a global batch holds pictures of two sizes"
    for batches in ranks:
        assert batches.position == start + num_batches * stream["batch_size"]
        batches.close()
    return keys


def in_time(function):
    """Call a function and return what it returns; fail where it does not end."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(function()), daemon=True)
    thread.start()
    thread.join(TIME_LIMIT_S)
    assert ended, "it hangs, or failed above"
    return ended[0]


def assert_once_an_epoch(keys, shards, group):
    """Assert that the samples of every group come epoch after epoch, each of them once in each."""
    reader = Reader(shards)
    everything = [reader.key(number) for number in range(shards.num_samples)]
    for name in set(map(group, everything)):
        expected = {key for key in everything if group(key) == name}
        found = [key for key in keys if group(key) == name]
        for start in range(0, len(found), len(expected)):
            epoch = found[start : start + len(expected)]
            assert len(set(epoch)) == len(epoch), f"a sample of {name} came twice"
            assert set(epoch) <= expected
        assert len(found) >= len(expected), f"{name} did not come once; the test is too short"


@pytest.mark.parametrize("name", ["plain", "one sample", "mixture", "balance", "balanced mixture", "buckets"])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**40),
    window=st.integers(0, 4),
    worlds=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    workers=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    stop=st.integers(0, 4),
)
def test_every_sample_once_an_epoch(sets, name, seed, window, worlds, workers, stop):
    shards, mixing, group = sets[name]
    batch_size = math.lcm(*worlds)
    # 19 batches hold the three sizes as often as all their samples ask for, the rarest in two of them.
    num_batches = stop + (19 if name == "buckets" else 2 + 4 * shards.num_samples // batch_size)
    stream = {"batch_size": batch_size, "seed": seed, "window": window}

    def joined():
        before = read(shards, mixing, stop, world=worlds[0], workers=workers[0], **stream)
        rest = {"world": worlds[1], "workers": workers[1], "start": stop * batch_size}
        return before | read(shards, mixing, num_batches - stop, **rest, **stream)

    keys = in_time(joined)
    assert sorted(keys) == list(range(num_batches * batch_size)), "a position is missing"
    whole = in_time(lambda: read(shards, mixing, num_batches, world=1, workers=0, **stream))
    assert keys == whole, "another number of ranks has other batches"
    assert_once_an_epoch([keys[position] for position in range(len(keys))], shards, group)
