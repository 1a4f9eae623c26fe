"""Batches and runs from a bad server are bitwise those of the local folder, and its failures are counted."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from streams import in_order, joined

from bad_server import (
    EPOCH,
    NUM_SHARDS,
    PATIENT,
    PER_SHARD,
    STREAM,
    assert_same,
    names,
    serving,
    take,
)
from driftmap.data.batch import Batches, Stream
from driftmap.data.cache import Cache
from driftmap.data.prefetch import NUM_THREADS
from driftmap.data.reader import Reader
from driftmap.data.remote import place_of
from driftmap.data.shards import CARD, ShardSet
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from, resolved, schema
from driftmap.trainer.report import read_log
from runs import checkpoints, driftmap, read_losses, wait_until, write_config

# A bad server


def test_more_than_an_epoch_is_bitwise_the_local_one_and_every_failure_is_counted(local, tmp_path):
    num_batches = 2 * EPOCH
    expected = take(local, num_batches)
    with serving(local.folder, faulty=True) as server:
        shards = ShardSet.open(server.address, cache=tmp_path, **PATIENT)
        assert (shards.fingerprint, shards.counts) == (local.fingerprint, local.counts)
        with Batches(shards, Stream(**STREAM)) as batches:
            assert_same([next(batches) for _ in range(num_batches)], expected)
            # What was read ahead may still be failing.
            wait_until(lambda: batches.reader_stats["retries"] == server.num_failed)
        stats = batches.reader_stats
    assert server.faults["dropped"] > 0
    assert server.faults["cut"] + server.faults["busy"] > 0
    assert server.faults["slept"] > 0
    assert stats["downloads"] == NUM_SHARDS
    assert stats["range_reads"] == 0
    assert stats["cache_hits"] + stats["cache_misses"] >= 12 * num_batches
    assert stats["downloaded_bytes"] >= sum(local.num_bytes)
    assert all(server.whole[name] == 1 for name in local.shards)


def test_two_ranks_and_a_restart_in_the_middle(local, tmp_path):
    expected = take(local, EPOCH + 5)
    with serving(local.folder, faulty=True) as server:

        def rank(number):
            part = {"rank": number, "world": 2}
            shards = ShardSet.open(server.address, cache=tmp_path, **PATIENT)
            before = take(shards, 8, **part)
            again = ShardSet.open(server.address, cache=tmp_path, **PATIENT)
            return before + take(again, EPOCH - 3, start=8 * 12, **part)

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(rank, range(2)))
    assert server.num_failed > 0
    for whole, *halves in zip(expected, *parts, strict=True):
        assert_same([joined(halves)], [in_order(whole)])
    # What a restart broke off is asked for once more, by at most as many threads as there were.
    assert sum(server.whole[name] for name in local.shards) <= NUM_SHARDS + 2 * NUM_THREADS


def test_a_server_without_range_reads_is_explained(local, tmp_path):
    with serving(local.folder) as server:
        server.answers_ranges = False
        shards = ShardSet.open(server.address, cache=tmp_path, cache_bytes=9000, tries=2, first_delay_s=0.001)
        with pytest.raises(OSError, match="a server without range reads needs a cache, data.cache_bytes"):
            Reader(shards).read(0)


def test_a_shard_that_is_never_whole_ends_in_one_clear_error(local, tmp_path):
    with serving(local.folder) as server:
        server.cut = {"shard-000004.tar"}
        shards = ShardSet.open(server.address, cache=tmp_path, tries=3, first_delay_s=0.001)
        with Batches(shards, Stream(**STREAM)) as batches, pytest.raises(OSError) as caught:
            for _ in range(EPOCH):
                next(batches)
        message = str(caught.value)
        assert message.startswith(f"{server.address}/shard-000004.tar could not be read in 3 tries, ")
        assert "put it there again; then run the same command again" in message
    assert server.asked["shard-000004.tar"] in (3, 6)  # by the threads ahead, and by the reader
    assert "shard-000004.tar" not in names(tmp_path, "*.tar")
    assert names(tmp_path, "*.tmp") == []


@pytest.mark.parametrize("spoil", [lambda data: data[:-10240], lambda data: data + b"\0", "flip"])
def test_a_shard_with_other_bytes_than_its_sidecar_is_refused(local, tmp_path, spoil):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in local.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / local.shards[2]
    data = bytearray(shard.read_bytes())
    if spoil == "flip":
        data[local.load_index(2).offsets[3, 0] + 5] ^= 1
    shard.write_bytes(data if spoil == "flip" else spoil(data))
    with serving(folder) as server:
        shards = ShardSet.open(server.address, cache=tmp_path / "cache", tries=2, first_delay_s=0.001)
        problem = r"k0017\.\w+" if spoil == "flip" else r"bytes came"
        with pytest.raises(OSError, match=rf"shard-000002\.tar could not be read in 2 tries.*{problem}"):
            Reader(shards).read(2 * PER_SHARD)
        assert Reader(shards).read(0).key == "k0000"
    assert names(tmp_path / "cache", "*.tar") == ["shard-000000.tar"]


def test_what_is_not_there_is_said_at_once(local, tmp_path):
    with serving(tmp_path) as server:
        with pytest.raises(ValueError, match=r"has no dataset\.json; check the address, and that the folder"):
            ShardSet.open(server.address, cache=tmp_path / "cache")
        assert sum(server.asked.values()) == 1
    with pytest.raises(OSError, match=r"dataset\.json could not be read in 2 tries"):
        ShardSet.open(server.address, cache=tmp_path / "cache", tries=2, first_delay_s=0.001)


# Addresses and the config


def put_into_memory(folder):
    for file in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/sets/points/{file.name}", file.read_bytes())


def test_another_kind_of_address(local, tmp_path):
    put_into_memory(local.folder)
    shards = ShardSet.open("memory://sets/points/", cache=tmp_path)
    assert_same(take(shards, EPOCH), take(local, EPOCH))
    assert str(shards.folder) == "memory://sets/points"
    fsspec.filesystem("memory").rm("/sets", recursive=True)


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub (2.4) asks of the Hub to read files of the data set lab/points."""

    folder: Path

    def do_GET(self):  # noqa: N802
        """Answer what the repository is, which files it has, and these or parts of them."""
        if self.path.startswith("/api/datasets/lab/points/tree/main"):
            files = ((file.name, file.stat().st_size) for file in self.folder.iterdir())
            about = [{"type": "file", "path": name, "oid": "b" * 40, "size": size} for name, size in files]
            self.answer(json.dumps(about).encode())
            return
        if self.path.startswith("/api/datasets/lab/points"):
            self.answer(json.dumps({"id": "lab/points", "sha": "a" * 40, "private": False}).encode())
            return
        body = (self.folder / self.path.removeprefix("/datasets/lab/points/resolve/main/")).read_bytes()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
            start, end = map(int, asked.groups())
            self.answer(body[start : end + 1], 206, f"bytes {start}-{end}/{len(body)}")
        else:
            self.answer(body)

    def answer(self, body, status=200, content_range=None):
        """Send it."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def test_a_data_set_on_the_hub(local, tmp_path):
    code = """
    import sys
    from pathlib import Path
    from driftmap.data.reader import Reader
    from driftmap.data.shards import ShardSet
    from driftmap.data.stream import ShardStream
    here, address, cache = Path(sys.argv[1]), "hf://datasets/lab/points", Path(sys.argv[2])
    sets = ShardSet.open(here), ShardSet.open(address, cache=cache)
    readers = [Reader(shards) for shards in sets]
    for number in range(sets[0].num_samples):
        assert readers[0].read(number) == readers[1].read(number), number
    heads = [[sample.members for sample in ShardStream.of(place).head] for place in (here, address)]
    assert heads[0] == heads[1]
    """
    handler = type("Handler", (Hub,), {"folder": local.folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        # The client reads these when it is imported, so it is another process.
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        place |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_TOKEN": "hf_test"}
        place |= {"HF_HUB_OFFLINE": "0"}  # whatever the tests themselves run under
        command = [sys.executable, "-c", textwrap.dedent(code), str(local.folder), str(tmp_path / "cache")]
        environment = {**os.environ, **place, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.returncode == 0, done.stderr


def test_names_that_lead_out_of_the_cache_are_refused(local, tmp_path):
    memory = fsspec.filesystem("memory")
    card = (local.folder / CARD).read_text().replace("shard-000000.tar", "../../evil.tar")
    memory.pipe_file(f"/bad/{CARD}", card.encode())
    with pytest.raises(ValueError, match=r"holds the shard name '\.\./\.\./evil\.tar'"):
        ShardSet.open("memory://bad", cache=tmp_path)


def test_the_environment_sets_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFTMAP_CACHE", str(tmp_path))
    monkeypatch.setenv("DRIFTMAP_CACHE_BYTES", "12345")
    assert Cache.of() == Cache(tmp_path / "driftmap-shards", 12345)
    assert Cache.of(tmp_path / "other", 7) == Cache(tmp_path / "other" / "driftmap-shards", 7)
    monkeypatch.setenv("DRIFTMAP_CACHE_BYTES", "50GB")
    with pytest.raises(ValueError, match="DRIFTMAP_CACHE_BYTES is '50GB'; expected a number of bytes"):
        Cache.of()


def test_an_address_stays_as_it_is_in_a_config(tmp_path):
    config = write_config(tmp_path / "config.yaml", "http://host/dir/", data__cache=str(tmp_path))
    recipe = recipe_from(read_config(config))
    assert (recipe.data.shards, recipe.data.cache) == ("http://host/dir", tmp_path)
    assert resolved(recipe)["data"]["shards"] == "http://host/dir"
    assert recipe_from(resolved(recipe)) == recipe
    local = recipe_from(read_config(config, ["data.shards=a/b/", "data.cache=null"]))
    assert resolved(local)["data"]["shards"] == "a/b"
    assert {"cache", "cache_bytes"} <= schema()["$defs"]["DataSection"]["properties"].keys()
    for override, message in {
        "data.shards=htp://host/dir": "data.shards: nothing opens addresses of the kind htp://",
        "data.cache_bytes=0": "data.cache_bytes: input should be greater than 0",
        "data.shards=there": "data: cache and cache_bytes have no effect on shards in a local folder",
    }.items():
        with pytest.raises(ConfigError, match=message):
            recipe_from(read_config(config, [override]))
    with pytest.raises(
        ValueError, match="http:/host/dir was an address, http://..., before it became a Path"
    ):
        place_of(tmp_path.__class__("http://host/dir"))


def test_a_run_from_an_address_is_the_local_one(local, tmp_path):
    runs = tmp_path / "here", tmp_path / "there"
    with serving(local.folder, faulty=True) as server:
        for run, shards in zip(runs, (local.folder, server.address), strict=True):
            config = write_config(tmp_path / f"{run.name}.yaml", shards, data__window=4)
            cache = [f"data.cache={tmp_path / 'cache'}"] if run == runs[1] else []
            for steps in (4, 8):  # the second goes on from the first
                words = ("train", config, f"training.steps={steps}", *cache, "--out", run)
                driftmap(*words, logs=tmp_path / f"{run.name}.logs").succeeded()
    # The memory of one process is not that of the next, so this one has to be straight.
    config = write_config(tmp_path / "memory.yaml", "memory://sets/points", data__window=4)
    words = (
        "train",
        config,
        "training.steps=8",
        f"data.cache={tmp_path / 'third'}",
        "--out",
        tmp_path / "memory",
    )
    put = functools.partial(put_into_memory, local.folder)
    driftmap(*words, logs=tmp_path / "memory.logs", before=put).succeeded()
    assert read_losses(tmp_path / "memory") == read_losses(runs[0])
    assert len(names(tmp_path / "third", "*.tar")) > 0
    here, there = map(checkpoints, runs)
    assert list(here) == list(there)
    for step in here:
        tensors = [name for name in here[step] if name.endswith(".safetensors")]
        assert len(tensors) >= 3
        assert [here[step][name] for name in tensors] == [there[step][name] for name in tensors]
    assert read_losses(runs[0]) == read_losses(runs[1])
    assert len(names(tmp_path / "cache", "*.tar")) > 0
    told = [read_log(run / "log.jsonl")[0] for run in runs]
    assert told[1][0]["data_downloads"] > 0 and "data_downloads" not in told[0][0]
