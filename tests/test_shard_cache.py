"""The cache of remote shards never grows beyond its bound, and holds whole shards only, each fetched once."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bad_server import (
    EPOCH,
    NUM_SHARDS,
    PATIENT,
    PER_SHARD,
    STREAM,
    assert_same,
    held_bytes,
    names,
    serving,
    take,
    watched,
)
from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.cache import Cache, _entries
from driftmap.data.plan import Plan
from driftmap.data.prefetch import Ahead
from driftmap.data.reader import Reader
from driftmap.data.shards import CARD, ShardSet
from runs import FORKS, wait_until


def test_a_spoiled_file_of_the_cache_is_fetched_again(local, tmp_path):
    with serving(local.folder) as server:
        shards = ShardSet.open(server.address, cache=tmp_path)
        expected = Reader(shards).read(3)
        (file,) = tmp_path.rglob("*.tar")
        whole = file.read_bytes()
        (sidecar,) = tmp_path.rglob("*.idx")
        for spoiled in (bytes(len(whole)), whole[:-1]):
            file.write_bytes(spoiled)
            sidecar.write_bytes(sidecar.read_bytes()[:-9])
            assert Reader(shards).read(3) == expected
            assert file.read_bytes() == whole
        assert (server.whole[file.name], server.whole[sidecar.name]) == (3, 3)


def test_the_oldest_goes_first_but_never_one_that_is_open(tmp_path):
    cache = Cache.of(tmp_path, 350)
    files = [cache.folder / f"{name}.tar" for name in "abcd"]
    for number, file in enumerate(files[:3]):
        file.write_bytes(bytes(100))
        os.utime(file, (number, number))
    opened = cache.open(files[0], 100)
    os.utime(files[0], (0, 0))
    with cache.lock(files[3]):
        growing = cache.reserve(files[3], 200)
        assert names(tmp_path, "*.tar") == ["a.tar"]
        assert cache.reserve(cache.folder / "e.tar", 100) is None  # 100 open, 200 growing
        os.close(opened)
        assert cache.reserve(cache.folder / "e.tar", 151) is None
        assert growing.exists()
    assert cache.reserve(cache.folder / "e.tar", 151) is not None
    assert not growing.exists()  # nobody holds its lock: it was left by a killed process


def test_other_files_in_the_folder_of_the_cache_are_safe(local, tmp_path):
    mine = tmp_path / "mine.tar"
    mine.write_bytes(bytes(10**6))
    with serving(local.folder) as server:
        bound = 2 * local.num_bytes[0]
        shards = ShardSet.open(server.address, cache=tmp_path, cache_bytes=bound)
        assert sum(len(batch["index"]) for batch in ordered(shards, 50)) == NUM_SHARDS * PER_SHARD
    assert mine.stat().st_size == 10**6


def read_all(address, cache, ready, go):
    shards = ShardSet.open(address, cache=cache, **PATIENT)
    ready.set()
    go.wait(30)
    take(shards, EPOCH)


def test_two_processes_download_each_shard_once(local, tmp_path):
    with serving(local.folder) as server:
        go = FORKS.Event()
        readies = [FORKS.Event(), FORKS.Event()]
        processes = [
            FORKS.Process(target=read_all, args=(server.address, tmp_path, ready, go)) for ready in readies
        ]
        for process in processes:
            process.start()
        assert all(ready.wait(30) for ready in readies)
        go.set()
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    assert {name: server.asked[name] for name in local.shards} == dict.fromkeys(local.shards, 1)
    assert server.asked[CARD] == 2


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_shard(local, tmp_path):
    with serving(local.folder) as server:
        server.stall = set(local.shards)
        ready, go = FORKS.Event(), FORKS.Event()
        go.set()
        process = FORKS.Process(target=read_all, args=(server.address, tmp_path, ready, go))
        process.start()
        wait_until(lambda: any(file.stat().st_size for file in tmp_path.rglob("*.tar.*.tmp")))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert names(tmp_path, "*.tar") == []
        assert names(tmp_path, "*.tar.*.tmp") != []
        server.stall = set()
        shards = ShardSet.open(server.address, cache=tmp_path, **PATIENT)
        assert_same(take(shards, EPOCH), take(local, EPOCH))
    assert names(tmp_path, "*.tmp") == []


@pytest.mark.parametrize("kind", [".tar", ".idx"])
def test_closing_does_not_wait_for_a_server_that_gives_no_whole_file(kind, local, tmp_path):
    with serving(local.folder) as server:
        shards = ShardSet.open(server.address, cache=tmp_path, tries=100, first_delay_s=30)
        server.cut = {name.replace(".tar", kind) for name in local.shards}
        batches = Batches(shards, Stream(**STREAM))
        wait_until(lambda: server.faults["cut"] > 0)
        began = time.monotonic()
        batches.close()
        assert time.monotonic() - began < 5


def test_a_small_cache_keeps_its_bound_and_gives_the_same_batches(local, tmp_path):
    bound = sum(local.num_bytes) // 3
    expected = take(local, 2 * EPOCH)
    with serving(local.folder, faulty=True) as server, watched(tmp_path) as sizes:
        shards = ShardSet.open(server.address, cache=tmp_path, cache_bytes=bound, **PATIENT)
        with Batches(shards, Stream(**STREAM)) as batches:
            assert_same([next(batches) for _ in range(2 * EPOCH)], expected)
            stats = batches.reader_stats
    assert stats["range_reads"] == 0
    assert NUM_SHARDS < stats["downloads"] <= 2.5 * NUM_SHARDS  # what is fetched ahead is there when needed
    assert len(sizes) > 20
    assert bound / 2 < max(sizes) <= bound


@pytest.mark.parametrize("when", ["listed", "removed"])
def test_a_file_that_is_renamed_meanwhile_is_counted(when, tmp_path, monkeypatch):
    """A download ends after its old name was found: before it is looked at, or before it is to be removed."""
    cache, whole = Cache(tmp_path, 100), tmp_path / "one.tar"
    growing, asked, ended = cache.reserve(whole, 60), threading.Event(), threading.Event()
    growing.write_bytes(bytes(60))

    def download():
        with cache.lock(whole):
            asked.wait()
            cache.keep(growing, whole)
        ended.set()

    def meanwhile(found):
        found = list(found)
        asked.set()
        ended.wait(0.3)
        return iter(found)

    listed, entries = Path.rglob, _entries
    thread = threading.Thread(target=download)
    thread.start()
    if when == "listed":
        monkeypatch.setattr(Path, "rglob", lambda *arguments: meanwhile(listed(*arguments)))
    else:
        monkeypatch.setattr("driftmap.data.cache._entries", lambda folder: meanwhile(entries(folder)))
    assert cache.reserve(tmp_path / "other.tar", 50, spare=[tmp_path]) is None
    thread.join()
    assert whole.stat().st_size == 60


def test_a_cache_smaller_than_a_shard_reads_samples_alone(local, tmp_path):
    bound = local.num_bytes[0] - 1
    sidecars = sum(file.stat().st_size for file in local.folder.iterdir() if file.suffix != ".tar")
    with serving(local.folder, faulty=True) as server, watched(tmp_path) as sizes:
        shards = ShardSet.open(server.address, cache=tmp_path, cache_bytes=bound, **PATIENT)
        with pytest.warns(UserWarning, match="set data.window to fewer shards, or data.cache_bytes higher"):
            batches = Batches(shards, Stream(**STREAM))
        with batches:
            assert_same([next(batches) for _ in range(6)], take(local, 6))
            stats = batches.reader_stats
    assert (stats["downloads"], names(tmp_path, "*.tar")) == (0, [])
    assert stats["range_reads"] >= 6 * 12
    # A sample has 3.2 kB, three headers come between its members, and a few are asked for again.
    assert stats["downloaded_bytes"] < 6000 * stats["range_reads"] + 2 * sidecars
    assert max(sizes) <= bound


def test_a_window_that_does_not_fit_keeps_what_came_first(local, tmp_path):
    bound = sum(local.num_bytes) // 2
    with serving(local.folder) as server:
        shards = ShardSet.open(server.address, cache=tmp_path, cache_bytes=bound, **PATIENT)
        with pytest.warns(UserWarning, match="the 30 shards of http"):
            batches = Batches(shards, Stream(**STREAM | {"window": 0}))
        with batches:
            assert_same([next(batches) for _ in range(EPOCH)], take(local, EPOCH, window=0))
            stats = batches.reader_stats
    assert 8 < stats["downloads"] < NUM_SHARDS / 2
    assert stats["range_reads"] > 0
    assert max(server.whole[name] for name in names(tmp_path, "*.tar")) == 1
    assert held_bytes(tmp_path) <= bound


@pytest.mark.parametrize("start", [0, 100])
def test_what_is_fetched_ahead_is_what_the_plan_needs_next_and_fits(start, local):
    plan, room = Plan(local.counts, seed=3, window=4), 6
    shards = plan.samples(0, 3 * 210) // PER_SHARD
    ahead = Ahead(
        lambda begin, end: shards[begin:end],
        sizes=[10] * NUM_SHARDS,
        max_bytes=10 * room,
        stride=6,
        cursor=start,
        horizon=210,
    )
    fetched = []
    for position in range(start, start + 210, 6):
        fetched += ahead.advance(position, num_waiting=0)
        # At least what is needed now has been asked for, at most what fits together.
        assert set(shards[position : position + 6]) <= set(fetched)
        assert len(set(shards[position : ahead.cursor])) <= room
    # One that is not needed for a while is named again; it is in the cache then.
    order = list(dict.fromkeys(fetched))
    assert order == list(dict.fromkeys(shards[start:]))[: len(order)]
    assert len(order) >= 24
    assert len(fetched) < 2.5 * NUM_SHARDS
