"""Without an index shards stream, drawn by a key and decoded as in exact order; it says what that costs."""

import json
import subprocess
import time
from collections import Counter

import fsspec
import numpy as np
import pytest
import torch

from bad_server import NUM_SHARDS, PER_SHARD, assert_same, serving
from driftmap.data import ahead
from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Reader
from driftmap.data.remote import place_of
from driftmap.data.resampled import COST, Resampled, first_batch
from driftmap.data.shards import CARD, ShardSet, ShardWriter, index_shards
from driftmap.data.stream import ShardStream
from driftmap.trainer.build import check_inputs
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.report import read_log
from runs import checkpoints, driftmap, read_losses, write_config

BATCH = 12
NUMBERED = "shard-{000000..000029}.tar"


@pytest.fixture(scope="module")
def bare(local, tmp_path_factory):
    """Copy the tars alone: no index, no card."""
    folder = tmp_path_factory.mktemp("bare")
    for name in local.shards:
        (folder / name).write_bytes((local.folder / name).read_bytes())
    return folder


def take(place, num_batches, *, start=0, card=None, **settings):
    """Return batches, and the names of their samples."""
    stream = Stream(**{"batch_size": BATCH, "seed": 3} | settings)
    with Resampled(ShardStream.of(place, card=card), stream, start=start) as batches:
        found = [next(batches) for _ in range(num_batches)]
        assert batches.position == start + num_batches * BATCH
        return found, [name for batch in found for name in batches.keys_of(batch["index"])]


def keys(names):
    return [name.rpartition(" ")[2] for name in names]


def write(folder, samples):
    with ShardWriter(folder) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return folder


# The stream


def test_samples_are_those_of_the_exact_order_in_another_one(bare, local):
    batches, names = take(bare, 20)
    (exact,) = ordered(local, NUM_SHARDS * PER_SHARD)
    number = {Reader(local).key(sample): sample for sample in range(local.num_samples)}
    rows = [number[key] for key in keys(names)]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert joined.pop("index").tolist() == list(range(20 * BATCH))
    assert_same([joined], [{name: exact[name][rows] for name in joined}])
    with Batches(local, Stream(BATCH, seed=3)) as others:
        assert next(others).keys() == batches[0].keys()


def test_the_draw_is_a_function_of_seed_rank_and_start(bare):
    batches, names = take(bare, 10)
    again, same = take(bare, 10)
    assert_same(batches, again)
    assert names == same
    for other in ({"seed": 4}, {"start": 10 * BATCH}, {"rank": 1, "world": 2}):
        _, others = take(bare, 10, **other)
        # 120 of 210 samples: by chance some half of them are the same, but not at the same places.
        assert sum(one == two for one, two in zip(names, others, strict=False)) < 10, other


def test_two_ranks_share_a_global_batch(bare):
    parts = [take(bare, 2, rank=rank, world=2)[0] for rank in range(2)]
    assert [[batch["index"].tolist() for batch in part] for part in parts] == [
        [list(range(rank, BATCH, 2)), list(range(BATCH + rank, 2 * BATCH, 2))] for rank in range(2)
    ]


def test_shards_are_drawn_evenly_with_replacement(bare):
    _, names = take(bare, 350)
    counts = Counter(keys(names))
    assert len(counts) == NUM_SHARDS * PER_SHARD
    # 4,200 of 210 samples, whole shards at a time: 20 of each on average, give or take 4.5.
    assert 4 <= min(counts.values()) < max(counts.values()) <= 40
    assert len(set(keys(names[: NUM_SHARDS * PER_SHARD]))) < NUM_SHARDS * PER_SHARD


@pytest.mark.parametrize(
    "place", ["{bare}/" + NUMBERED, "file://{bare}/" + NUMBERED, "pipe:cat {bare}/" + NUMBERED]
)
def test_patterns_and_commands_give_what_the_folder_gives(place, bare):
    assert_same(take(place.replace("{bare}", str(bare)), 10)[0], take(bare, 10)[0])


def test_a_command_may_print_a_compressed_tar(bare):
    assert_same(take(f"pipe:gzip -c {bare}/{NUMBERED}", 10)[0], take(bare, 10)[0])


def test_addresses(bare, local):
    memory = fsspec.filesystem("memory")
    for file in local.folder.iterdir():
        memory.pipe_file(f"/stream/{file.name}", file.read_bytes())
    expected, _ = take(bare, 10)
    assert_same(take(f"memory://stream/{NUMBERED}", 10)[0], expected)
    assert_same(take("memory://stream", 10)[0], expected)  # the card lists them
    assert ShardStream.of("memory://stream").labels == local.labels
    memory.rm(f"/stream/{CARD}")
    with pytest.raises(
        ValueError, match=r"memory://stream has no dataset.json that lists its shards; name them"
    ):
        ShardStream.of("memory://stream")
    memory.rm("/stream", recursive=True)


# What goes wrong


def test_a_bad_server_costs_shards_and_not_the_run(bare):
    with serving(bare, faulty=True) as server:
        shards = ShardStream.of(f"{server.address}/{NUMBERED}")
        with pytest.warns(
            UserWarning, match=r"shard-0000\d\d.tar broke off \(.*; going on with another shard"
        ):
            with Resampled(shards, Stream(BATCH, seed=3)) as batches:
                for _ in range(100):
                    next(batches)
                stats = batches.reader_stats
    # aiohttp itself asks once more where a connection is dropped before the answer.
    assert 0 < server.faults["cut"] + server.faults["busy"] <= stats["shards_broken"] <= server.num_failed
    assert stats["shards_opened"] > 5 * stats["shards_broken"]


def test_what_no_other_shard_mends_ends_the_run(bare, tmp_path):
    whole = (bare / "shard-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"cut.tar: ReadError: unexpected end of data; .* copy or write it again"
    ):
        take(tmp_path, 10)
    with pytest.raises(ValueError, match=r"away.tar: it is not there; check data.shards"):
        take(tmp_path / "away.tar", 1)
    with serving(bare) as server:
        with pytest.raises(ValueError, match=r"shard-00003[01].tar: it is not there"):
            take(f"{server.address}/shard-00003{{0..1}}.tar", 1)


def test_a_command_that_fails_is_noticed_however_far_it_came(bare, monkeypatch):
    monkeypatch.setattr("driftmap.data.stream._FIRST_DELAY_S", 0.0)
    with pytest.warns(UserWarning, match=r"shard-000031.tar broke off \("):
        take(f"pipe:cat {bare}/shard-{{000000..000031}}.tar", 10)
    # The tar is whole, and nothing but the status of the command tells that something was wrong.
    monkeypatch.setattr("driftmap.data.stream._MAX_EMPTY", 10**6)
    with pytest.warns(UserWarning, match=r"broke off \(OSError: .*exit 3"):
        take(f"pipe:cat {bare}/{NUMBERED}; exit 3", 3)
    monkeypatch.undo()
    monkeypatch.setattr("driftmap.data.stream._FIRST_DELAY_S", 0.0)
    with pytest.warns(UserWarning, match="broke off"), pytest.raises(OSError) as caught:
        take("pipe:exit 3", 1)
    assert str(caught.value).startswith("the last 8 shards gave no sample; the last one was pipe:exit 3 (")


def test_closing_does_not_wait_for_a_command_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)
    points = npy_bytes(np.zeros(2, np.float32))
    write(tmp_path, {f"k{number}": {"points.npy": points} for number in range(30)})
    shards = ShardStream.of(f"pipe:cat {tmp_path}/shard-000000.tar; exec sleep 5")
    batches = Resampled(shards, Stream(BATCH, seed=3))
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 4
    with pytest.raises(RuntimeError, match="these batches are closed"):
        next(batches)


def test_members_that_lie_apart_need_an_index(tmp_path):
    names = ["a.txt", "b.txt", "a.points.npy", "b.points.npy"]
    for name in names:
        (tmp_path / name).write_bytes(npy_bytes(np.zeros(2)) if name.endswith("npy") else b"x")
    (tmp_path / "shards").mkdir()
    subprocess.run(["tar", "-cf", "shards/x.tar", *names], cwd=tmp_path, check=True)
    with pytest.raises(
        ValueError, match=r"x.tar: other samples lie between the members of a, .*shards index`"
    ):
        take(tmp_path / "shards", 1)
    assert Reader(index_shards(tmp_path / "shards")).read(0).members.keys() == {"txt", "points.npy"}


def test_labels_that_the_model_does_not_know_are_named(tmp_path):
    points = npy_bytes(np.zeros(2, np.float32))
    samples = {f"k{number}": {"points.npy": points, "cls": b"%d" % number} for number in range(9)}
    shards = ShardStream.of(write(tmp_path, samples))
    assert max(shards.labels) == 7  # of the first eight samples
    with Resampled(shards, Stream(50, seed=0), num_classes=8) as batches:
        with pytest.raises(
            ValueError, match=r"shard-000000.tar: k8 is of class 8, but the model knows 0 to 7"
        ):
            next(batches)


def test_latents_need_a_card_that_tells_their_scale(tmp_path):
    moments = npy_bytes(np.ones((2, 1, 2, 2), np.float16))
    folder = write(tmp_path / "latents", {"a": {"moments.npy": moments, "json": b'{"style": 1}'}})
    with pytest.raises(
        ValueError, match=r"no dataset.json tells their scale; set data.card to the dataset.json"
    ):
        first_batch(ShardStream.of(folder), 1)
    card = tmp_path / "card.json"
    card.write_text('{"info": {"latents": {"scaling_factor": 2.0}, "styles": ["thin", "thick"]}}')
    shards = ShardStream.of(folder, card=card)
    assert shards.info["latents"]["scaling_factor"] == 2.0
    assert first_batch(shards, 8)["mean"].shape == (1, 1, 2, 2)
    assert first_batch(shards.labelled_by("json:style"), 8)["label"].tolist() == [1]
    (folder / CARD).write_text(card.read_text())
    assert ShardStream.of(folder).info == shards.info
    with pytest.raises(
        ValueError, match="nothing.json is missing; data.card is the dataset.json of a data set"
    ):
        ShardStream.of(folder, card=tmp_path / "nothing.json")


@pytest.mark.parametrize("place", ["pipe:cat ${MISSING}/{0..3}.tar", "x/{0..3.tar"])
def test_places_that_cannot_be_expanded(place, monkeypatch):
    monkeypatch.delenv("WDS_MISSING", raising=False)
    with pytest.raises(ValueError, match=r"cannot be expanded \(.*; braces have to be closed, .* WDS_NAME"):
        ShardStream.of(place)


def test_what_needs_an_index_says_so(bare):
    shards = ShardStream.of(bare)
    for attempt in (lambda: next(ordered(shards, 1)), lambda: Reader(shards).read(0)):
        with pytest.raises(ValueError, match=r"is read without an index, .*run `driftmap shards index`"):
            attempt()
    for attempt in (lambda: place_of("pipe:cat x.tar"), lambda: ShardSet.open("pipe:cat s3://x/x.tar")):
        with pytest.raises(ValueError, match="is a command, .* set data.order to resampled"):
            attempt()


# Runs


def test_a_run_goes_on_with_other_samples_and_says_what_that_costs(bare, tmp_path):
    config = write_config(tmp_path / "config.yaml", f"pipe:cat {bare}/{NUMBERED}", data__order="resampled")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    both = [
        driftmap("train", config, *words, logs=tmp_path / "logs")
        for words in (("--out", straight), ("training.steps=2", "--out", stopped))
    ]
    for command in both:
        assert command.succeeded().stderr.count(COST) == 1
    driftmap("train", config, "--out", stopped, logs=tmp_path / "logs").succeeded()
    here, there = read_losses(straight), read_losses(stopped)
    assert here.keys() == there.keys() == set(range(1, 7))
    assert [here[step] == there[step] for step in here] == [True, True, False, False, False, False]
    state = json.loads((stopped / "checkpoints" / max(checkpoints(stopped)) / "state.json").read_text())
    assert (state["step"], state["samples"]) == (6, 6 * 32)
    assert read_log(straight / "log.jsonl")[0][-1]["data_shards_opened"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.order=exact", "pipe:cat .* is a command, .* set data.order to resampled"),
        ("data.window=3", "data: window has no effect in the order resampled; remove it"),
        ("data.cache=there", "data: cache has no effect in the order resampled"),
        ("model.num_classes=3", "holds the class 4; classes are counted from 0, so set it to 5 or more"),
    ],
)
def test_settings_that_do_not_go_together(override, message, bare, tmp_path):
    config = write_config(tmp_path / "config.yaml", f"pipe:cat {bare}/{NUMBERED}", data__order="resampled")
    with pytest.raises(ConfigError, match=message):
        check_inputs(recipe_from(read_config(config, [override])))
