"""Each mistake gives one clear message, and leaves what was there as it was."""

import functools
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from driftmap.data.members import npy_bytes
from driftmap.data.shards import index_shards, write_shard
from driftmap.data.synthetic import SETS, write_points
from runs import checkpoints, driftmap, tree, write_config


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Make what a user may have: shards of points, of classes and of pictures, and a run of four steps."""
    home = tmp_path_factory.mktemp("template")
    write_points(home / "points", "moons", n=100, seed=0)
    write_numbered(home / "classes", lambda n: {"points.npy": point(n), "cls": str(n % 3).encode()})
    write_numbered(home / "bare", lambda n: {"points.npy": point(n)})
    write_numbered(home / "space", lambda n: {"points.npy": npy_bytes(np.full(3, n, np.float32))})
    write_numbered(home / "pictures", lambda n: {"png": picture(n)}, channels=1)
    config = write_config(home / "config.yaml", home / "points")
    driftmap("train", config, "training.steps=4", "--out", home / "run", logs=home / "run.logs").succeeded()
    return home


@pytest.fixture
def home(template, tmp_path):
    """Copy it, to make mistakes with."""
    return shutil.copytree(template, tmp_path / "home")


def write_numbered(folder, members, **info):
    write_shard(folder / "shard.tar", ((f"{n:03d}", members(n)) for n in range(64)))
    index_shards(folder, info=info)


def point(number):
    return npy_bytes(SETS["moons"](1, number)[0])


def picture(number):
    buffer = io.BytesIO()
    Image.new("L", (16, 16), number).save(buffer, "png")
    return buffer.getvalue()


def refused(home, *arguments):
    """Run a command; assert one message, nothing changed and no new checkpoint; return the message."""
    before = tree(home)
    message = driftmap(*arguments, logs=home / "mistakes.logs").refused()
    after = tree(home)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if "checkpoints" in name]
    return message


def train(home, *overrides, out="new", config="config.yaml", shards="points"):
    text = (home / "config.yaml").read_text()
    (home / "config.yaml").write_text(
        text.replace(text.split("shards: ")[1].split("\n")[0], str(home / shards))
    )
    return refused(home, "train", home / config, *overrides, "--out", home / out)


# Configs


def test_a_typo_in_a_config(home):
    assert train(home, "optimizer.learning_rat=1", out="run").startswith("optimizer.learning_rat: ")
    message = train(home, "training.step=3")
    assert "training.step: " in message and "did you mean 'steps'?" in message
    message = train(home, "objective.name=flow_maching")
    assert "objective.name: no such name 'flow_maching'; did you mean 'flow_matching'?" in message
    assert not (home / "new").exists()


def test_a_value_of_the_wrong_type(home):
    for key, value in (("data.batch_size", "many"), ("optimizer.lr", "-1"), ("model.width", "wide")):
        message = train(home, f"{key}={value}", out="run")
        assert message.startswith(f"{key}: ") and value in message


def test_a_config_that_is_not_there(home):
    message = train(home, config="confg.yaml")
    assert str(home / "confg.yaml") in message and "did you mean 'config.yaml'?" in message


def test_a_config_that_is_no_yaml(home):
    (home / "broken.yaml").write_text("model: {name: mlp\ndata: [")
    assert f"{home / 'broken.yaml'} is no valid YAML" in train(home, config="broken.yaml")


# Shards: what else can be broken about them is in test_broken_inputs.py


def test_shards_that_are_not_there(home):
    message = train(home, shards="pints")
    assert f"{home / 'pints'} is no folder; expected a folder of WebDataset tars" in message
    assert not (home / "new").exists()


def test_a_truncated_tar(home):
    (tar,) = (home / "points").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-5000])
    message = train(home, out="run")
    assert str(tar) in message and "copy it again" in message


def test_a_changed_byte_of_a_sample(home):
    (tar,) = (home / "points").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[512 * 41 + 130] ^= 1  # after a header and its padding lies a point
    tar.write_bytes(data)
    message = train(home)
    assert tar.name in message and "points.npy has changed since it was indexed" in message
    assert "copy the shard again" in message


def classifier(**settings):
    words = ", ".join(
        f"{name}: {value}" for name, value in {"width": 8, "num_classes": 1, **settings}.items()
    )
    return "objective={name: classifier}", f"model={{name: convnet, {words}}}"


# What does not fit


def test_labels_beyond_the_classes(home):
    message = train(home, "model.num_classes=2", shards="classes")
    assert "num_classes 2" in message and "holds the class 2" in message and "set it to 3" in message
    assert "holds no class labels" in train(home, "model.num_classes=2", shards="bare")


def test_samples_of_another_shape_than_the_network(home):
    message = train(home, shards="space")
    assert "the model takes samples of shape (2,)" in message
    assert "shard.tar: 000" in message and "has shape (3,)" in message and "model section" in message
    message = train(home, *classifier(channels=3), shards="pictures")
    assert "num_classes" not in message and "(3, H, W)" in message


def test_a_teacher_that_is_no_run(home):
    distil = "objective={name: semigroup}"
    message = train(home, distil, f"teacher.run={home / 'points'}")
    assert f"{home / 'points'} is no run folder" in message and "driftmap train" in message
    (home / "begun").mkdir()
    shutil.copy(home / "run" / "network.json", home / "begun")
    assert "has no checkpoint yet" in train(home, distil, f"teacher.run={home / 'begun'}")


def test_a_teacher_of_other_samples(home):
    message = train(
        home, "objective={name: semigroup}", "model.channels=3", f"teacher.run={home / 'run'}", shards="space"
    )
    assert f"the teacher {home / 'run'} takes samples of shape (2,)" in message


def test_a_checkpoint_of_another_model(home):
    shutil.copytree(home / "run" / "checkpoints", home / "other" / "checkpoints")
    message = train(home, "model.width=8", out="other")
    assert "is a checkpoint of another model" in message and "[16], expected [8]" in message


def test_a_network_that_no_longer_is_the_checkpoints(home):
    file = home / "run" / "network.json"
    file.write_text(file.read_text().replace('"depth": 1', '"depth": 2'))
    message = train(home, f"model={{from_run: {home / 'run'}}}")
    assert "is a checkpoint of another model: missing backbone.blocks.1.layers.1.weight" in message


def make_latents(home):
    """Train two autoencoders for a step, and encode the pictures by the right one: all in one process."""
    from driftmap.launch.cli import app

    autoencoder = (
        "objective={name: autoencoder}",
        "model={name: autoencoder_kl, in_channels: 1, out_channels: 1, latent_channels: 2, "
        "norm_num_groups: 4, block_out_channels: [4], sample_size: 16}",
        "training.steps=1",
        f"data.shards={home / 'pictures'}",
    )
    encode = ("shards", "encode", home / "pictures", home / "latents", "--autoencoder", home / "right")
    for words in (
        ("train", home / "config.yaml", *autoencoder, "seed=0", "--out", home / "right"),
        ("train", home / "config.yaml", *autoencoder, "seed=1", "--out", home / "wrong"),
        encode,
    ):
        app([str(word) for word in words], standalone_mode=False)


def test_an_autoencoder_that_did_not_encode_the_latents(home):
    dit = "model={name: dit, in_channels: 2, sample_size: 16, width: 8, depth: 1, num_heads: 1}"
    words = ("train", home / "config.yaml", dit, f"data.shards={home / 'latents'}", "training.steps=1")
    before = functools.partial(make_latents, home)
    driftmap(*words, "--out", home / "flow", logs=home / "setup.logs", before=before).succeeded()
    message = refused(home, "export", home / "flow", home / "out", "--autoencoder", home / "wrong")
    assert f"{home / 'latents'} was encoded by the autoencoder" in message and str(home / "wrong") in message
    assert "give the right run, or encode the pictures again" in message
    assert not (home / "out").exists()


# While it trains


def test_a_learning_rate_at_which_nothing_is_finite(home):
    saved = checkpoints(home / "run")
    # The second step is the first bad one; it is seen before it is saved, though no line is due.
    message = train(home, "optimizer.lr=1e38", "optimizer.clip_norm=null", "training.log_every=5")
    assert (
        "gradient of step 2 is not finite" in message
        and "optimizer.lr" in message
        and "samples: 0000" in message
    )
    assert checkpoints(home / "run") == saved


def test_a_run_of_another_recipe_in_the_folder(home):
    message = train(home, "seed=3", out="run")
    assert "seed is 0 there, 3 here" in message and "another --out" in message


def test_a_folder_that_cannot_be_made(home):
    message = train(home, out="config.yaml/run")
    assert str(home / "config.yaml") in message
