"""Pictures of several sizes: each gets the nearest one, no shard and no batch holds two, none is dropped."""

import io
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image
from streams import joined

from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.buckets import buckets_of, nearest, parse_sizes
from driftmap.data.joined import join
from driftmap.data.making import make_shards
from driftmap.data.members import npy_bytes
from driftmap.data.order import Mixing
from driftmap.data.pictures import Draft, PicturePolicy, size_of
from driftmap.data.shards import ShardSet, index_shards
from driftmap.data.sources import Request, find_source
from driftmap.data.split import split
from driftmap.trainer.build import build
from driftmap.trainer.recipe import recipe_from
from runs import driftmap

SIZES = ((16, 16), (12, 20), (20, 12))


def write(folder, counts, value=0, **info):
    """Write a data set of shards of so many points, which hold the number and a value."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                data = npy_bytes(np.array([number, value], np.float32))
                header = tarfile.TarInfo(f"{number}.points.npy")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
                number += 1
    return index_shards(folder, info=info)


def read(shards, num_batches, **settings):
    """Return the points of some batches."""
    with Batches(shards, Stream(**{"batch_size": 8, "seed": 3, **settings})) as batches:
        return joined(next(batches) for _ in range(num_batches))["data"].numpy()


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of 30 pictures: 12 nearly square, 9 wide, 6 tall, 3 tall by their EXIF alone."""
    random = np.random.default_rng(0)
    sizes = [(20, 20), (25, 24)] * 6 + [(30, 50)] * 9 + [(50, 30)] * 6 + [(30, 50)] * 3
    for number, (height, width) in enumerate(sizes):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6 if number >= 27 else 1
        file = tmp_path / "in" / f"{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, exif=exif)
    return tmp_path / "in"


def made(pictures, out, **settings):
    return make_shards(find_source(str(pictures), Request(buckets=SIZES)), out, **settings)


def test_each_picture_gets_the_nearest_size_and_no_shard_holds_two(pictures, tmp_path):
    shards = made(pictures, tmp_path / "out", samples_per_shard=5)
    assert shards.info["buckets"] == [[16, 16, 12], [12, 20, 9], [20, 12, 9]]
    assert shards.counts == (5, 5, 2, 5, 4, 5, 4) and "size" not in shards.info
    batches = list(ordered(shards, 7))
    assert [(len(batch["data"]), *batch["data"].shape[2:]) for batch in batches] == [
        (7, 16, 16),
        (5, 16, 16),
        (7, 12, 20),
        (2, 12, 20),
        (7, 20, 12),
        (2, 20, 12),
    ]
    # A batch is the same for any number of ranks.
    halves = [batch for rank in range(2) for batch in ordered(shards, 7, rank=rank, world=2)]
    assert sorted(batch["index"][0].item() for batch in halves) == [0, 7, 12, 19, 21, 28]


def test_a_killed_making_of_buckets_goes_on_to_the_same_bytes(pictures, tmp_path):
    class Stop(Exception):
        pass

    def stop(done):
        if done == 15:
            raise Stop

    with pytest.raises(Stop):
        made(pictures, tmp_path / "out", samples_per_shard=5, progress=stop)
    done = []
    found = made(pictures, tmp_path / "out", samples_per_shard=5, progress=done.append)
    assert done[0] == 12 and done[-1] == 30
    assert found.fingerprint == made(pictures, tmp_path / "other", samples_per_shard=5, workers=2).fingerprint
    assert made(pictures, tmp_path / "out") == found, "what is complete was not left alone"


def test_buckets_stay_apart_when_shards_are_packed_anew_but_not_when_their_pictures_are(pictures, tmp_path):
    shards = made(pictures, tmp_path / "out", samples_per_shard=5)
    packed = make_shards(find_source(str(shards.folder)), tmp_path / "packed")
    assert (packed.counts, packed.info["buckets"]) == ((12, 9, 9), shards.info["buckets"])
    square = make_shards(find_source(str(shards.folder), Request(size=8)), tmp_path / "square")
    assert (square.counts, square.info["size"], square.buckets.keys()) == ((30,), 8, {None})
    again = make_shards(find_source(str(shards.folder), Request(buckets=SIZES[:2])), tmp_path / "again")
    assert again.info["buckets"] == [[16, 16, 21], [12, 20, 9]]


def test_a_part_is_held_out_before_pictures_are_sorted(pictures, tmp_path):
    parts = split(find_source(str(pictures), Request(buckets=SIZES)), 0.3)
    counts = [sum(make_shards(part, tmp_path / f"{number}").counts) for number, part in enumerate(parts)]
    assert sum(counts) == 30 and min(counts) > 0
    shards = made(pictures, tmp_path / "out")
    with pytest.raises(ValueError, match="held out only where its pictures are made, with --buckets"):
        make_shards(split(find_source(str(shards.folder)), 0.3)[0], tmp_path / "late")


def test_a_size_is_read_without_decoding_and_a_bad_picture_is_named(pictures, tmp_path):
    assert size_of(Draft(pictures / "0/28.png", "here")) == (50, 30)
    (pictures / "0/28.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"28\.png: its size cannot be read"):
        made(pictures, tmp_path / "out")


def test_a_size_beside_buckets_has_no_effect_and_is_refused():
    with pytest.raises(ValueError, match="--size 8 has no effect where --buckets gives the sizes"):
        Request(size=8, buckets=SIZES).policy()
    assert PicturePolicy(1, buckets=SIZES).size_of((10, 30)) == (12, 20)


def test_autoencoders_train_and_encode_buckets_and_a_network_of_one_size_refuses_them(pictures, tmp_path):
    out, run, latents = tmp_path / "out", tmp_path / "run", tmp_path / "latents"
    words = ("shards", "make", pictures, out, "--buckets=16x16,12x20,20x12", "--samples-per-shard=5")
    driftmap(*words, logs=tmp_path / "logs").succeeded()
    (tmp_path / "autoencoder.yaml").write_text(AUTOENCODER.format(out))
    driftmap("train", tmp_path / "autoencoder.yaml", "--out", run, logs=tmp_path / "logs").succeeded()
    driftmap("shards", "encode", out, latents, "--autoencoder", run, logs=tmp_path / "logs").succeeded()
    found = ShardSet.open(latents)
    assert list(found.buckets) == list(SIZES)
    with Batches(found, Stream(4, seed=0)) as batches:
        shapes = {tuple(next(batches)["mean"].shape[1:]) for _ in range(16)}
    assert shapes == {(2, 8, 8), (2, 6, 10), (2, 10, 6)}
    (tmp_path / "dit.yaml").write_text(DIT.format(latents))
    message = driftmap(
        "train", tmp_path / "dit.yaml", "--out", tmp_path / "dit", logs=tmp_path / "logs"
    ).refused()
    assert "the model takes samples of shape (2, 8, 8), but shard-000003.tar" in message
    assert "has shape (2, 6, 10) (one of 3 sizes, and this network takes one)" in message


AUTOENCODER = """
data: {{shards: {}, batch_size: 4}}
model:
  name: autoencoder_kl
  latent_channels: 2
  block_out_channels: [4, 4]
  down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
  norm_num_groups: 2
objective: {{name: autoencoder}}
optimizer: {{lr: 1.0e-3}}
training: {{steps: 4, accumulation: 2}}
"""
DIT = """
data: {{shards: {}, batch_size: 4}}
model: {{name: dit, in_channels: 2, sample_size: 8, width: 8, depth: 1, num_heads: 1, num_classes: 2}}
objective: {{name: flow_matching}}
optimizer: {{lr: 1.0e-3}}
training: {{steps: 4}}
"""


def test_a_picture_goes_where_its_proportions_are():
    sizes = parse_sizes("64x64, 48x80,80x48")
    assert sizes == ((64, 64), (48, 80), (80, 48))
    assert [nearest(size, sizes) for size in ((10, 10), (100, 160), (2000, 1000), (10, 11))] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64", "'64' is no size; expected HEIGHTxWIDTH"),
        ("64x0", "'64x0' is no size"),
        ("8x8,4x6,16x16", "two of 8x8,4x6,16x16 have the same proportions"),
    ],
)
def test_sizes_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sizes(text)


def test_what_a_card_says_of_buckets_has_to_be_true():
    found = buckets_of([[8, 8, 5], [4, 6, 3]], (3, 2, 0, 3, 0), "here")
    assert {size: shards.tolist() for size, shards in found.items()} == {(8, 8): [0, 1], (4, 6): [2, 3, 4]}
    with pytest.raises(ValueError, match="shard 1 of here holds pictures of two buckets"):
        buckets_of([[8, 8, 4], [4, 6, 4]], (3, 2, 3), "here")
    with pytest.raises(ValueError, match="here holds 8 samples, but the buckets of its card have 7"):
        buckets_of([[8, 8, 4], [4, 6, 3]], (3, 2, 3), "here")


def test_buckets_are_weighed_by_what_they_hold_and_sets_by_their_weights(tmp_path):
    one = write(tmp_path / "one", [30, 10], 1, buckets=[[8, 8, 30], [4, 6, 10]])
    two = write(tmp_path / "two", [40], 2, size=8)
    data = read(one, 40)
    assert [len({number < 30 for number in batch}) for batch in data[:, 0].reshape(40, 8)] == [1] * 40
    assert np.sum(data[:, 0] < 30) == 240
    data = read(join([one, two]), 400, mixing=Mixing((1, 1)))
    small = (data[:, 1] == 1) & (data[:, 0] >= 30)
    assert small.reshape(400, 8).all(axis=1).sum() == small.reshape(400, 8).any(axis=1).sum() == 50
    assert np.sum(data[:, 1] == 1) == 1600


def test_data_sets_of_two_sizes_are_mixed_as_buckets_if_both_are_known(tmp_path):
    small = write(tmp_path / "8", [6], 1, size=8)
    large = write(tmp_path / "16", [6], 2, size=16)
    unknown = write(tmp_path / "x", [6], 3)
    assert join([small, large]).info["buckets"] == [[8, 8, 6], [16, 16, 6]]
    assert join([small, unknown]).buckets.keys() == {None}
    with pytest.raises(ValueError, match="the card of .*x says no size, but the mixture has several"):
        join([small, unknown, large])


def test_accumulation_changes_neither_batches_nor_their_sizes(tmp_path):
    shards = write(tmp_path / "set", [30, 10], buckets=[[8, 8, 30], [4, 6, 10]])
    whole = read(shards, 10)
    halves = read(shards, 20, batch_size=4, bucket_batch=8)
    assert np.array_equal(whole, halves)
    with pytest.raises(ValueError, match="bucket_batch is 6; expected a multiple of batch_size 4"):
        Stream(batch_size=4, seed=0, bucket_batch=6)


def test_a_recipe_keeps_the_samples_of_an_optimizer_step_to_one_size(pictures, tmp_path):
    shards = made(pictures, tmp_path / "out")
    run = build(recipe_from(yaml.safe_load(AUTOENCODER.format(shards.folder))), tmp_path / "run")
    with run.batches as batches:
        halves = [next(batches)["data"].shape for _ in range(40)]
    assert halves[0::2] == halves[1::2] and len(set(halves)) == 3
