"""For a sample that cannot be used any number of processes takes the same other one, and tells of it once."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from streams import in_order, joined
from test_kills import read, record

from bad_server import EPOCH, PER_SHARD, STREAM, serving
from driftmap.data.batch import Batches, Stream
from driftmap.data.faults import Fault, Quarantine
from driftmap.data.index import load_index
from driftmap.data.members import npy_bytes
from driftmap.data.plan import Plan
from driftmap.data.resampled import first_batch
from driftmap.data.shards import ShardSet, ShardWriter, index_shards, write_shard
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.faults import AgreedBatches
from driftmap.trainer.report import read_log
from driftmap.trainer.world import World
from runs import FORKS, checkpoints, driftmap, launched, read_losses, wait_until, write_config

NUM_SAMPLES = 60
# Number: why it is bad. The first sample of the data set is one of them.
BAD = {
    0: "moments.npy is float16 (3,); expected float (2, C, H, W)",
    7: "it has shape (1, 4, 2); the first good sample has (1, 2, 2)",
    21: "it holds numbers that are not finite; write the sample again",
    22: "the array says float16 (2, 1, 2, 2) but holds 15 bytes",
    23: "there is no cls, which other samples of the data set have",
    24: "cls is b'cat'; expected the number of a class",
    41: "moments.npy has changed since it was indexed (checksum); copy the shard again",
}


def moments(number, shape=(2, 1, 2, 2)):
    return np.random.default_rng(number).standard_normal(shape).astype(np.float16)


def members(number, *, spoiled):
    data, label = npy_bytes(moments(number)), str(number % 3).encode()
    if spoiled:
        data = {
            0: npy_bytes(np.zeros(3, np.float16)),
            7: npy_bytes(moments(7, (2, 1, 4, 2))),
            21: npy_bytes(moments(21) * np.float16(np.inf)),
            22: data[:-1],
        }.get(number, data)
        label = {24: b"cat"}.get(number, label)
    return {"moments.npy": data} | ({} if spoiled and number == 23 else {"cls": label})


def write_latents(folder, *, spoiled):
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for number in range(NUM_SAMPLES):
            writer.write(f"k{number:02d}", members(number, spoiled=spoiled))
    shards = index_shards(folder)
    if spoiled:
        change_a_byte(folder / "shard-000002.tar", 1)
    return shards


def change_a_byte(tar, row):
    index = load_index(tar)
    data = bytearray(tar.read_bytes())
    data[int(index.offsets[row, index.extensions.index("moments.npy")]) + 130] ^= 1
    tar.write_bytes(data)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Write good shards and the same with bad samples."""
    home = tmp_path_factory.mktemp("latents")
    return tuple(write_latents(home / name, spoiled=name == "spoiled") for name in ("good", "spoiled"))


def take(shards, num_batches, *, batch_size=12, start=0, known=(), workers=None, **settings):
    """Return batches of one process, and the bad samples that it has met."""
    quarantine = Quarantine(known)
    stream = Stream(batch_size, seed=1, **settings)
    with Batches(shards, stream, start=start, quarantine=quarantine, workers=workers) as batches:
        found = [in_order(next(batches)) for _ in range(num_batches)]
        keys = [key for batch in found for key in batches.keys_of(batch["index"])]
        return found, quarantine.take(batches.position), keys


def first_met(faults):
    """Return the faults of several processes as a checkpoint holds them."""
    quarantine = Quarantine()
    quarantine.settle(faults)
    return list(quarantine.settled.values())


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# Batches


def test_every_kind_of_bad_sample_is_replaced_by_a_good_one(latents):
    good, spoiled = latents
    batches, faults, keys = take(spoiled, 10)  # two epochs
    assert {fault.sample: fault.reason for fault in faults} == BAD
    assert all(
        (fault.key, fault.shard) == (f"k{fault.sample:02d}", good.shards[fault.sample // 20])
        for fault in faults
    )
    assert not {f"k{number:02d}" for number in BAD} & set(keys)
    found, expected = joined(batches), joined(take(good, 10)[0])
    planned = take(good, 10)[2]
    for row, (key, was) in enumerate(zip(keys, planned, strict=True)):
        number = int(key[1:])
        assert key == was or int(was[1:]) in BAD
        assert torch.equal(found["mean"][row], torch.from_numpy(moments(number)[0]))
        assert found["label"][row] == number % 3
    kept = [row for row, was in enumerate(planned) if int(was[1:]) not in BAD]
    assert len(kept) == 120 - 2 * len(BAD)
    assert_same(
        {name: values[kept] for name, values in found.items()},
        {name: values[kept] for name, values in expected.items()},
    )


def test_no_sample_stands_in_for_many(tmp_path):
    """A third of 300 samples is lost in a missing shard; in their 100 places stand some 80 others."""
    with ShardWriter(tmp_path, samples_per_shard=100) as writer:
        for number in range(300):
            writer.write(str(number), {"points.npy": npy_bytes(np.float32([number]))})
    shards = index_shards(tmp_path)
    (tmp_path / shards.shards[0]).unlink()
    batches, faults, _ = take(shards, 30, batch_size=10)
    times = Counter(joined(batches)["data"].flatten().tolist())
    assert sum(times.values()) == 300 and len(times) == 200 and max(times.values()) <= 5
    assert sum(count > 1 for count in times.values()) > 60
    assert {fault.sample for fault in faults} == set(range(100))
    assert {fault.key for fault in faults} == {str(number) for number in range(100)}
    assert {fault.reason for fault in faults} == {f"{tmp_path / shards.shards[0]}: No such file or directory"}


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_processes_and_workers_has_the_same_batches(latents, world, workers):
    _, spoiled = latents
    batches, faults, _ = take(spoiled, 8)
    parts = [take(spoiled, 8, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert_same(joined([batch for part, _, _ in parts for batch in part]), joined(batches))
    assert first_met([fault for _, found, _ in parts for fault in found]) == first_met(faults)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_stream_has_the_same_batches_and_the_same_list(latents, stop):
    _, spoiled = latents
    whole, faults, _ = take(spoiled, 8)
    before = first_met(take(spoiled, stop)[1])
    parts = [take(spoiled, 8 - stop, start=12 * stop, known=before, rank=rank, world=3) for rank in range(3)]
    assert_same(joined([batch for part, _, _ in parts for batch in part]), joined(whole[stop:]))
    assert before + first_met([fault for _, found, _ in parts for fault in found]) == first_met(faults)


def test_what_was_read_ahead_is_not_in_the_list(latents):
    _, spoiled = latents
    quarantine = Quarantine()
    with Batches(spoiled, Stream(12, seed=1), prefetch=8, quarantine=quarantine) as batches:
        next(batches)
        wait_until(lambda: len(quarantine.take(10**9)) == len(BAD))
        met = quarantine.take(batches.position)
    assert met == take(spoiled, 1)[1] and len(met) < len(BAD)


def test_a_known_bad_sample_is_not_read_again(latents):
    good, _ = latents
    # It is good here, so only a list that is believed keeps it out.
    known = [Fault(0, number, good.shards[number // 20], f"k{number:02d}", "told before") for number in BAD]
    batches, faults, keys = take(good, 10, known=known)
    assert faults == [] and not {fault.key for fault in known} & set(keys)
    assert_same(joined(batches), joined(take(latents[1], 10)[0]))


def test_a_shard_that_an_address_never_gives_is_tried_once(local, tmp_path):
    """Its samples are bad, as those of a missing shard are, and each counts when the stream meets it."""
    copy = shutil.copytree(local.folder, tmp_path / "copy")
    shards = ShardSet.open(copy)
    (copy / "shard-000004.tar").unlink()

    def read(shards):
        quarantine = Quarantine()
        with Batches(shards, Stream(**STREAM), quarantine=quarantine) as batches:
            return [next(batches) for _ in range(EPOCH)], quarantine.take(batches.position)

    expected, missing = read(shards)
    with serving(local.folder) as server:
        server.cut = {"shard-000004.tar"}
        far = ShardSet.open(server.address, cache=tmp_path / "cache", tries=3, first_delay_s=0.001)
        found, unreadable = read(far)
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)
    assert server.asked["shard-000004.tar"] in (3, 6, 9)  # by the reader, and by threads ahead
    assert [fault.key for fault in unreadable] == [fault.key for fault in missing]
    assert len(missing) == PER_SHARD
    assert all("could not be read in 3 tries" in fault.reason for fault in unreadable)


def read_with_small_files(address, cache, file):
    # A limit on the size of a file fails in the same calls as a full disk, with another number.
    shards, quarantine = ShardSet.open(address, cache=cache), Quarantine()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with Batches(shards, Stream(12, seed=3), quarantine=quarantine) as batches:
        try:
            next(batches)
        except OSError as error:
            file.write_text(f"{errno.errorcode[error.errno]} {quarantine.take(10**9)}")


def test_a_full_disk_is_no_bad_sample(local, tmp_path):
    """What this machine lacks ends a run at once, however many samples may be bad."""
    said = tmp_path / "said"
    with serving(local.folder) as server:
        process = FORKS.Process(target=read_with_small_files, args=(server.address, tmp_path / "cache", said))
        process.start()
        process.join(60)
    assert said.read_text() == "EFBIG []"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sample_of_a_bucket_is_replaced_by_one_of_its_size(tmp_path, world):
    sizes = [(2, 2), (4, 2)]
    with ShardWriter(tmp_path, samples_per_shard=12) as writer:
        for number in range(24):
            values = moments(number, (2, 1, *sizes[number // 12]))
            values = {4: values * np.float16(np.nan), 14: moments(14)}.get(number, values)  # not its own size
            writer.write(f"k{number:02d}", {"moments.npy": npy_bytes(values)})
    shards = index_shards(tmp_path, info={"buckets": [[*size, 12] for size in sizes]})
    parts = [take(shards, 12, batch_size=4, rank=rank, world=world) for rank in range(world)]
    for batches in zip(*(found for found, _, _ in parts), strict=True):
        assert len({batch["mean"].shape[2:] for batch in batches}) == 1
    assert {fault.sample for _, faults, _ in parts for fault in faults} == {4, 14}
    expected = take(shards, 12, batch_size=4)
    assert sorted(key for _, _, keys in parts for key in keys) == sorted(expected[2])
    assert {key for key in expected[2] if key < "k12"} | {"k04"} == {f"k{number:02d}" for number in range(12)}


def test_the_first_good_samples_stand_for_all(latents):
    _, spoiled = latents
    assert first_batch(spoiled, 8)["index"].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]


# How many


@pytest.mark.parametrize(
    ("num_bad", "num_samples", "fraction", "stops"),
    [
        (1, 1000, 0.001, False),
        (2, 1000, 0.001, True),
        (1, 900, 0.001, True),
        (10, 2000, 0.01, False),  # of the first 32, but few
        (11, 2000, 0.01, True),
        (11, 2000, 0.5, False),
        (30, 2000, 0.5, True),
    ],
)
def test_more_than_a_fraction_stops(tmp_path, num_bad, num_samples, fraction, stops):
    plan = Plan((num_samples,), 0)
    bad = set(plan.samples(0, num_bad).tolist())
    points = (
        (str(n), {"points.npy": npy_bytes(np.float32([np.nan if n in bad else n]))})
        for n in range(num_samples)
    )
    write_shard(tmp_path / "shard.tar", points)
    shards, quarantine, told = index_shards(tmp_path), Quarantine(), []
    world = World(Accelerator(cpu=True))
    limits = {"max_bad_fraction": fraction, "tell": lambda faults, stops: told.extend(faults)}
    with AgreedBatches(
        Batches(shards, Stream(32, seed=0), quarantine=quarantine),
        shards,
        world,
        quarantine=quarantine,
        **limits,
    ) as batches:
        if stops:
            named = r"shard\.tar: \d+: it holds numbers that are not finite"
            with pytest.raises(ValueError, match=rf"^{num_bad} samples cannot .*: {named}"):
                next(batches)
        else:
            next(batches)
    assert {int(fault.key) for fault in told} == bad
    assert [fault.position for fault in told] == list(range(num_bad))


# Runs


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Write 100 points; three that are bad in three ways are met in the third batch of 32."""
    folder = tmp_path_factory.mktemp("points") / "points"
    infinite, wide, cut = Plan((100,), 0).at(np.array([70, 75, 90])).tolist()

    def members(number):
        values = np.random.default_rng(number).standard_normal(3 if number == wide else 2)
        values[0] = np.inf if number == infinite else values[0]
        return {"points.npy": npy_bytes(values.astype(np.float32))[: -1 if number == cut else None]}

    write_shard(folder / "shard.tar", ((f"{number:03d}", members(number)) for number in range(100)))
    return index_shards(folder).folder, [f"{number:03d}" for number in (infinite, wide, cut)]


def quarantined(run):
    return [(entry["position"], entry["key"]) for entry in newest(run).state["quarantine"]]


def incidents(run):
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def kill_in_step(step, file, rank=0):
    """Write the samples of every step, and die after one step before it is saved."""
    from driftmap.trainer import build

    record(file, rank)
    build_run = build.build

    def build_and_die(recipe, folder):
        run = build_run(recipe, folder)

        def die(run, losses):
            if run.step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        run.hooks.append(die)
        return run

    build.build = build_and_die


@pytest.mark.parametrize("numbers", [(2, 1), (1, 2)])
def test_a_kill_and_another_number_of_processes_change_nothing(points, tmp_path, numbers):
    folder, bad = points
    config = write_config(
        tmp_path / "config.yaml", folder, data__max_bad_fraction=0.05, training__save_in_background=False
    )
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    words = ("train", config, "--out")
    seen = functools.partial(record, tmp_path / "alone")
    command = launched(1, *words, whole, logs=whole, before=seen)[0].succeeded()
    assert "a sample cannot be used, and another one takes its place: shard.tar: " in command.stderr
    before, after = numbers
    doomed = functools.partial(kill_in_step, 5, tmp_path / "first")
    for command in launched(before, *words, mixed, logs=mixed, before=doomed):
        assert command.ended() == -signal.SIGKILL, command.stderr
    assert newest(mixed).state["step"] == 4
    seen = functools.partial(record, tmp_path / "second")
    for command in launched(after, *words, mixed, logs=mixed, before=seen):
        assert "cannot be used" not in command.succeeded().stderr, "it was told before the kill"

    steps = read(tmp_path / "first") | read(tmp_path / "second")
    assert {step: sorted(samples) for step, samples in steps.items()} == {
        step: sorted(samples) for step, samples in read(tmp_path / "alone").items()
    }
    assert not {key for samples in steps.values() for _, key in samples} & set(bad)
    losses = [[values["loss"] for values in read_losses(run).values()] for run in (whole, mixed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6
    assert quarantined(whole) == quarantined(mixed) == [(70, bad[0]), (75, bad[1]), (90, bad[2])]
    for run in (whole, mixed):
        assert [line.get("data_bad_samples") for line in read_log(run / "log.jsonl")[0]] == [None] * 2 + [
            3
        ] * 4
        assert [(line["kind"], line["step"], line["key"]) for line in incidents(run)] == [
            ("bad sample", 3, key) for key in bad
        ]


def test_without_a_fraction_the_first_bad_sample_stops_all_processes(points, tmp_path):
    folder, bad = points
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", folder)
    commands = launched(2, "train", config, "--out", run, logs=run)
    first, second = (command.refused() for command in commands)
    assert time.time() - newest(run).folder.stat().st_mtime < 15
    assert first == second and first.startswith(tuple(f"shard.tar: {key}: " for key in bad))
    assert list(checkpoints(run)) == ["step-00000002"]


def test_too_many_stop_all_processes_and_allowing_more_goes_on(points, tmp_path):
    folder, bad = points
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", folder, data__max_bad_fraction=0.02)
    words = ("train", config, "--out", run)
    messages = [command.refused() for command in launched(2, *words, logs=run)]
    assert time.time() - newest(run).folder.stat().st_mtime < 15
    assert messages[0] == messages[1]
    assert messages[0].startswith("3 samples cannot be used") and "0.02 allows of 100: " in messages[0]
    assert all(f"shard.tar: {key}: " in messages[0] for key in bad)
    assert f"`driftmap shards check {folder}`" in messages[0] and "raise data.max_bad_fraction" in messages[0]
    assert list(checkpoints(run)) == ["step-00000002"] and quarantined(run) == []
    driftmap(*words, "data.max_bad_fraction=0.05", logs=tmp_path / "run.logs").succeeded()
    assert [key for _, key in quarantined(run)] == bad and len(incidents(run)) == 3
    assert read_losses(run).keys() == set(range(1, 7))
