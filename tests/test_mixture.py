"""Mixed streams keep their weights exactly and their own orders, in closed form, at any position.

So data sets are mixed, classes balanced, and pictures of several sizes kept apart, without any state.
"""

import io
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import joined

from bad_server import PATIENT, serving
from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.index import build_index
from driftmap.data.joined import join
from driftmap.data.members import npy_bytes
from driftmap.data.mixture import Mixture, whole_weights
from driftmap.data.order import Classes, Mixing, mixed
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardSet, index_shards
from driftmap.trainer.build import build
from driftmap.trainer.config import ConfigError, checked, read_config
from driftmap.trainer.data_section import DataSection
from driftmap.trainer.recipe import recipe_from
from runs import write_config

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


class Numbers:
    """A source whose sample is (its number, the position in its stream)."""

    def __init__(self, source):
        self.source = source

    def at(self, positions):
        """Return it."""
        return positions * 100 + self.source

    def alike(self, position, draws):
        """Return what comes so much later."""
        return self.at(position + 1 + draws.astype(np.int64))


def mixture(weights, **settings):
    return Mixture([Numbers(number) for number in range(len(weights))], weights, **{"seed": 0, **settings})


def taken(mixed, num_positions, start=0):
    """Return the source and the position in it, of each position."""
    samples = mixed.at(np.arange(start, start + num_positions))
    return samples % 100, samples // 100


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**6), st.integers(1, 5))
def test_every_source_is_read_in_its_own_order_without_a_gap(weights, seed, stride):
    sources, places = taken(mixture(weights, seed=seed, stride=stride), 700)
    for source in range(len(weights)):
        assert np.array_equal(places[sources == source], np.arange(np.sum(sources == source)))
    units = sources[: len(sources) // stride * stride].reshape(-1, stride)
    assert np.all(units == units[:, :1]), "a unit is of two sources"


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**6))
def test_weights_are_exact_in_every_period(weights, seed):
    mixed = mixture(weights, seed=seed)
    whole = whole_weights(weights)
    assert mixed.period == sum(whole)
    sources, _ = taken(mixed, 3 * mixed.period, start=7 * mixed.period)
    for period in sources.reshape(3, -1):
        assert tuple(np.bincount(period, minlength=len(weights))) == whole


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=9), st.integers(0, 10**12))
def test_large_weights_are_kept_from_any_position_on(weights, start):
    mixed = mixture(weights)
    count = 30_000
    sources, places = taken(mixed, count, start=start)
    levels = np.ceil(np.log2(len(weights)))
    for source, weight in enumerate(weights):
        # Up to one for each level of the tree at both ends, and the units of two periods that are cut.
        expected = count * weight / sum(weights)
        spare = 2 * levels + mixed.period * weight / sum(weights) + levels
        assert abs(np.sum(sources == source) - expected) <= 2 * spare + 1
        if np.any(sources == source):
            assert abs(places[sources == source].min() - start * weight / sum(weights)) <= 2 * spare + 1


@settings(deadline=None)
@given(WEIGHTS, st.lists(st.integers(0, 10**13), min_size=1, max_size=20), st.integers(1, 9))
def test_any_positions_in_any_order(weights, positions, stride):
    mixed = mixture(weights, stride=stride)
    each = [int(mixed.at(np.array([position]))[0]) for position in positions]
    assert mixed.at(np.array(positions)).tolist() == each


def test_the_order_is_mixed_and_never_changes_between_versions():
    sources, _ = taken(mixture((3, 1)), 400)
    quarters = sources.reshape(-1, 4)
    assert set(np.argmax(quarters, axis=1)) == {0, 1, 2, 3}
    assert "".join(map(str, sources[:24])) == "000101000010001001001000"
    other, _ = taken(mixture((3, 1), seed=1), 400)
    assert not np.array_equal(sources, other)


def test_weights_as_people_write_them():
    assert whole_weights([3, 1]) == (3, 1)
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([1.5, Fraction(1, 3)]) == (9, 2)
    assert whole_weights([10**12, 1]) == (2**31 - 1, 1)
    with pytest.raises(ValueError, match="the weight 0 is no positive number"):
        whole_weights([1, 0])


def test_what_stands_in_for_a_sample_is_of_its_source():
    mixed = mixture((2, 1))
    draws = np.arange(100, dtype=np.uint64)
    for position, (source, place) in enumerate(zip(*taken(mixed, 30), strict=True)):
        assert np.array_equal(mixed.alike(position, draws), (place + 1 + np.arange(100)) * 100 + source)


# Data sets


def write(folder, labels, value=0, **info):
    """Write a data set of shards with these labels; points hold the number and a value."""
    folder.mkdir()
    number = 0
    for shard, found in enumerate(labels):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for label in found:
                members = {"points.npy": npy_bytes(np.array([number, value], np.float32))}
                if label is not None:
                    members["cls"] = str(label).encode()
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"{folder.name}-{number}.{extension}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                number += 1
        build_index(folder / f"{shard}.tar")
    return index_shards(folder, info=info)


def read(shards, num_batches, mixing, **settings):
    """Return the data and labels of some batches."""
    with Batches(shards, Stream(**{"batch_size": 8, "seed": 3, **settings}, mixing=mixing)) as batches:
        found = joined(next(batches) for _ in range(num_batches))
    return found["data"].numpy(), found["label"].numpy()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    classes = ["cat", "dog", "owl", "ant"]
    first = write(folder / "first", [[0, 0, 0, 3], [0] * 9, [3, 0, 0]], 1, classes=classes, size=8)
    second = write(folder / "second", [[0, 1], [1] * 5], 2, classes=classes, size=8)
    return first, second


def test_data_sets_are_mixed_by_their_weights(two):
    data, _ = read(join(two), 10, Mixing((3, 1)))
    assert np.bincount(data[:, 1].astype(int)).tolist() == [0, 60, 20]
    for value, shards in zip((1, 2), two, strict=True):
        numbers = data[data[:, 1] == value, 0].astype(int)
        for start in range(0, len(numbers), shards.num_samples):
            epoch = numbers[start : start + shards.num_samples]
            assert len(set(epoch)) == len(epoch)


@pytest.mark.parametrize("window", [0, 1])
def test_classes_come_equally_often_in_every_batch(two, window):
    data, labels = read(two[0], 10, Mixing(balance=True), window=window)
    assert np.array_equal(labels.reshape(10, 8).sum(axis=1), [4 * 3] * 10)
    rare = data[labels == 3, 0].reshape(-1, 2)
    assert {tuple(sorted(pair)) for pair in rare} == {(3, 13)}, "a rare sample came twice before the other"
    frequent = data[labels == 0, 0][:14]
    assert len(set(frequent)) == 14


def test_classes_are_balanced_inside_each_data_set_of_a_mixture(two):
    data, labels = read(join(two), 10, Mixing((1, 4), balance=True))
    found = {
        (value, label): int(np.sum((data[:, 1] == value) & (labels == label)))
        for value in (1, 2)
        for label in range(4)
    }
    assert found == {(1, 0): 8, (1, 1): 0, (1, 2): 0, (1, 3): 8, (2, 0): 32, (2, 1): 32, (2, 2): 0, (2, 3): 0}


def test_a_joined_set_is_all_of_its_parts(two, tmp_path, monkeypatch):
    joined = join(two)
    assert (joined.num_samples, joined.joined, joined.labels) == (23, (3, 2), {0: 15, 3: 2, 1: 6})
    assert joined.info["classes"] == ["cat", "dog", "owl", "ant"]
    (batch,) = ordered(joined, 100)
    assert batch["data"][:, 0].tolist() == [*range(16), *range(7)]
    assert join([two[1], two[0]]).fingerprint != joined.fingerprint
    monkeypatch.chdir(two[0].folder.parent)
    near = join([ShardSet.open("first"), ShardSet.open("second")])
    monkeypatch.chdir(tmp_path)
    assert Reader(near).read(22).key == "second-6", "the place of a data set depends on where one is"


@pytest.mark.parametrize(
    ("labels", "info", "message"),
    [
        (
            [[None]],
            {"classes": ["cat", "dog", "owl", "ant"]},
            "third has class labels: False, but .*first has True",
        ),
        (
            [[1]],
            {"classes": ["ant", "cat"]},
            r"third has classes \['ant', 'cat'\], but .*first has \['cat', 'dog'",
        ),
        ([[1]], {"encoder": "abc"}, "third has the encoder abc, but .*first has None; .*encode it again"),
        ([[1]], {"text": {"encoder": "abc"}}, "third has the text encoder abc"),
        ([[]], {}, "third holds no samples; leave it out"),
    ],
)
def test_data_sets_that_do_not_go_together_are_refused(two, tmp_path, labels, info, message):
    third = write(tmp_path / "third", labels, **info)
    with pytest.raises(ValueError, match=message):
        join([two[0], third])


def test_a_data_set_is_not_mixed_with_itself(two):
    with pytest.raises(ValueError, match="first is in the mixture twice"):
        join([two[0], two[1], two[0]])


def test_latents_of_one_encoder_have_the_scale_of_the_first(tmp_path):
    sets = [
        write(
            tmp_path / str(scale),
            [[scale]],
            scale,
            encoder="abc",
            latents={"scaling_factor": scale},
        )
        for scale in (2, 3)
    ]
    assert join(sets).info == {"encoder": "abc", "latents": {"scaling_factor": 2}}


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        ([[0, 1], [2, None]], "cls", "1.tar: set-3: there is no cls, which other"),
        ([[None]], "cls", r"set holds no class labels \(.cls\); remove it"),
        ([[0, 1]], "json:style", "set is labelled by 'json:style'"),
    ],
)
def test_classes_that_are_not_known_are_not_balanced(tmp_path, labels, label, message):
    shards = write(tmp_path / "set", labels, styles=["flat"]).labelled_by(label)
    with pytest.raises(ValueError, match=message):
        Batches(shards, Stream(batch_size=1, seed=0, mixing=Mixing(balance=True)))


def test_local_shards_and_those_behind_an_address_are_mixed(two, local, tmp_path):
    folder = write(tmp_path / "near", [[1, 2, 3], [], [4] * 6])
    expected = read(join([folder, local]), 40, Mixing((1, 2)), window=2)
    with serving(local.folder, faulty=True) as server:
        far = ShardSet.open(server.address, cache=tmp_path / "cache", **PATIENT)
        both = join([folder, far])
        assert both.fingerprint == join([folder, local]).fingerprint
        with Batches(both, Stream(8, seed=3, window=2, mixing=Mixing((1, 2)))) as batches:
            found = joined(next(batches) for _ in range(40))
            assert batches.reader_stats["downloads"] > 20
    for name, values in zip(("data", "label"), expected, strict=True):
        assert np.array_equal(values, found[name].numpy())


def test_a_local_shard_of_such_a_mixture_that_has_changed_is_named(local, tmp_path):
    folder = write(tmp_path / "near", [[1, 2, 3]])
    with serving(local.folder) as server:
        joined = join([folder, ShardSet.open(server.address, cache=tmp_path / "cache", **PATIENT)])
        tar = folder.folder / "0.tar"
        tar.write_bytes(tar.read_bytes().replace(b"NUMPY", b"NUMPI"))
        with pytest.raises(ValueError, match=r"near/0.tar has changed since it was indexed"):
            Reader(joined).read(0)


def test_data_sets_that_share_a_small_cache_leave_each_other_what_is_there(local, tmp_path):
    """Where the cache holds a part of both, nothing that was downloaded is removed for the other one."""
    far = tmp_path / "far"
    write(far, [[0] * 8] * 6)
    with serving(local.folder) as server, serving(far) as other:
        room = {"cache": tmp_path / "cache", "cache_bytes": 300_000}
        joined = join([ShardSet.open(each.address, **room, **PATIENT) for each in (server, other)])
        with pytest.warns(UserWarning, match="36 shards .* that are shuffled together"):
            batches = Batches(joined, Stream(12, seed=0, mixing=Mixing((1, 1))))
        with batches:
            downloads = []
            for _ in range(60):
                next(batches)
                downloads.append(batches.reader_stats["downloads"])
    assert downloads[0] > 0 and downloads[20] == downloads[-1]  # till then indices come, which take room


# Many samples


def test_ten_million_samples_are_balanced_with_little_memory():
    """What it needs is two bytes a sample, and it begins anywhere in the stream."""
    counts, names = (10_000,) * 1000, range(100)
    random = np.random.default_rng(0)
    labels = [random.integers(0, 100, 10_000, np.uint8) for _ in counts]
    classes = Classes.of(labels, names, counts)
    held = sum(each.nbytes for each in (classes.rows, classes.before, classes.starts))
    shards = ShardSet("here", tuple(map(str, range(1000))), counts, (), "")
    order = mixed(shards, Mixing(balance=True), classes, seed=0, window=0, bucket_batch=1)
    print(f"{held / 2**20:.0f} MiB for {shards.num_samples} samples of {len(names)} classes")
    assert held < 30e6
    samples = order.at(np.arange(10**10, 10**10 + 200))
    found = [labels[sample // 10_000][sample % 10_000] for sample in samples.tolist()]
    assert np.bincount(found).tolist() == [2] * 100


# The config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data: one of shards and mixture is needed"),
        ({"shards": "a", "mixture": [{"shards": "b"}, {"shards": "c"}]}, "data: one of shards and mixture"),
        ({"mixture": [{"shards": "b"}]}, "data: a mixture is of two data sets or more"),
        (
            {"mixture": [{"shards": "b"}, {"shards": "c", "weight": 0}]},
            "mixture.weight: .* greater than 0",
        ),
        ({"shards": "a", "balance": "classes"}, "data.balance: .* 'class'"),
        (
            {"shards": "a", "balance": "class", "order": "resampled"},
            "balance has no effect in the order resampled",
        ),
    ],
)
def test_mistakes_in_a_config_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        checked(DataSection, {"batch_size": 8, **settings}, place="data")


def test_a_config_opens_a_mixture(two):
    mixture = [{"shards": str(two[0].folder), "weight": 3}, {"shards": str(two[1].folder)}]
    section = checked(DataSection, {"batch_size": 8, "mixture": mixture, "balance": "class"}, place="data")
    assert section.open().fingerprint == join(two).fingerprint
    assert section.mixing == Mixing((3.0, 1.0), balance=True)


def test_a_run_reads_what_its_config_mixes(two, tmp_path):
    mixture = [{"shards": str(two[0].folder), "weight": 3}, {"shards": str(two[1].folder)}]
    config = write_config(
        tmp_path / "config.yaml", two[0].folder, data__mixture=mixture, data__balance="class"
    )
    settings = read_config(config, ["data.shards=null", "model.num_classes=4"])
    run = build(recipe_from(settings), tmp_path / "run")
    with run.batches as batches:
        labels = np.bincount(next(batches)["label"], minlength=4)
    assert labels.tolist() == [12 + 4, 4, 0, 12]
