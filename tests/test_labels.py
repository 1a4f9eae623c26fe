"""What labels a sample is said by the recipe, fits the network, and is the same on all processes."""

import json

import numpy as np
import pytest
import torch

from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.trainer.build import check_inputs, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.latents import Preparation
from driftmap.trainer.recipe import recipe_from
from runs import driftmap, launched, read_losses, write_config

MOODS = ["glad", "sad", "calm"]
INFO = {"moods": MOODS, "text": {"encoder": "x", "name": "x", "width": 6, "max_tokens": 3}}
DIT = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 24, "depth": 2, "num_heads": 2}
OF_CAPTIONS = {**DIT, "text_width": 6, "max_tokens": 3, "qk_norm": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with latents that have classes, moods (by number or by name) and captions."""
    folder = tmp_path_factory.mktemp("labels")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "latents") as writer:
        for number in range(48):
            moments = np.stack([generator.standard_normal((2, 4, 4)), np.full((2, 4, 4), 0.1)])
            caption = generator.standard_normal((number % 4, 6)).astype(np.float16)
            mood = number % 3 if number % 2 else MOODS[number % 3]
            members = {"moments.npy": npy_bytes(moments.astype(np.float32)), "cls": str(number % 2).encode()}
            members |= {"text.npy": npy_bytes(caption), "json": json.dumps({"mood": mood}).encode()}
            writer.write(f"{number:03d}", members)
    index_shards(folder / "latents", info=INFO)
    return folder


def config_of(home, label, model, **changes):
    settings = {"data__batch_size": 12, "data__label": label, "model": model, **changes}
    return write_config(home / "config.yaml", home / "latents", **settings)


def test_a_field_of_the_json_labels_by_number_or_by_name(home):
    shards = ShardSet.open(home / "latents").labelled_by("json:mood")
    assert (shards.label_names, list(shards.label_numbers)) == (MOODS, [0, 1, 2])
    assert next(ordered(shards, 9))["label"].tolist() == [0, 1, 2] * 3
    with Batches(shards, Stream(8, seed=0)) as batches:
        batch = next(batches)
        numbers = batches.plan.at(batch["index"].numpy())
        assert batch["label"].tolist() == [number % 3 for number in numbers] and "text" not in batch


def test_a_caption_becomes_the_condition_of_its_own_sample(home):
    shards = ShardSet.open(home / "latents").labelled_by("text")
    with Batches(shards, Stream(8, seed=0)) as batches:
        loaded = next(batches)
        condition = Preparation.of(shards.info, seed=0, device=torch.device("cpu"))(loaded).condition
        numbers = batches.plan.at(loaded["index"].numpy())
    assert condition.mask.sum(1).tolist() == [number % 4 for number in numbers]
    assert condition.tokens.dtype == torch.float32 and condition.tokens.shape == (8, 3, 6)


@pytest.mark.parametrize(
    "label, model, message",
    [
        ("text", DIT, r"data.label: 'text', but the model takes no captions"),
        ("cls", OF_CAPTIONS, r"data.label: 'cls', but the model has text_width 6; .* needs 'text'"),
        ("json:mood", DIT, r"data.label: 'json:mood' has no effect: the model has no classes"),
        ("json:mood", {**DIT, "num_classes": 2}, r"num_classes 2, but .* holds the class 2; .* set it to 3"),
        ("text", {**OF_CAPTIONS, "text_width": 5}, r"text_width 5, but the captions in .* have 6; set"),
        ("text", {**OF_CAPTIONS, "max_tokens": 2}, r"max_tokens 2, but the captions in .* have 3; set"),
        ("text", {**OF_CAPTIONS, "num_classes": 2}, r"model.text_width: 6, but model.num_classes is 2"),
        ("mood", DIT, r"there is no label 'mood'; expected cls, text, or json:FIELD"),
        (
            "json:hue",
            DIT,
            r"no list 'hues' for the label 'json:hue'; besides cls and text there are json:mood",
        ),
    ],
)
def test_what_does_not_fit_is_refused(home, label, model, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(recipe_from(read_config(config_of(home, label, model))))


@pytest.mark.parametrize("found", ['{"mood": "angry"}', '{"mood": 3}', '{"mood": true}', "{}", "no json"])
def test_a_label_that_is_none_is_named(tmp_path, found):
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("one", {"points.npy": npy_bytes(np.zeros(2, np.float32)), "json": found.encode()})
    index_shards(tmp_path / "s", info=INFO)
    with pytest.raises(
        ValueError, match=r"\.tar: one: (mood is .*; expected a number below 3|its json has no)"
    ):
        next(ordered(ShardSet.open(tmp_path / "s").labelled_by("json:mood"), 1))


def test_a_teacher_of_other_classes_is_refused(home):
    taught = config_of(home, "json:mood", {**DIT, "num_classes": 3}, training={"steps": 1, "save_every": 1})
    run = train(recipe_from(read_config(taught)), home / "moods").folder
    settings = {"objective": {"name": "semigroup"}, "teacher": {"run": str(run)}}
    student = config_of(home, "cls", {**DIT, "num_classes": 3}, **settings)
    with pytest.raises(
        ConfigError, match=r"data.label: 'cls', but the classes of the teacher are 'json:mood'"
    ):
        check_inputs(recipe_from(read_config(student)))
    check_inputs(recipe_from(read_config(student, ["data.label=json:mood"])))


def test_captions_train_the_same_sharded(home):
    """The hardest way: the derivative of a derivative, through blocks that are sharded and recomputed."""
    config = config_of(home, "text", OF_CAPTIONS, objective={"name": "lagrangian"}, optimizer={"lr": 1e-3})
    driftmap("train", config, "--out", home / "one", logs=home / "one.logs").succeeded()
    sharded = ["strategy={name: fsdp}", "training.recompute_every=1"]
    for command in launched(2, "train", config, *sharded, "--out", home / "two", logs=home / "two.logs"):
        command.succeeded()
    alone, together = read_losses(home / "one"), read_losses(home / "two")
    for step, values in alone.items():
        assert together[step] == {name: pytest.approx(v, rel=1e-5, abs=1e-7) for name, v in values.items()}
