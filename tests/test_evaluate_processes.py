"""An evaluation is one table and one set of pictures on any number of processes, whole or not there."""

import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip import write_clip
from driftmap.data.shards import ShardSet, index_shards, write_shard
from driftmap.trainer.build import train
from driftmap.trainer.config import ConfigError
from driftmap.trainer.features import features_named
from driftmap.trainer.judge import Judge
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.references import Dealer, Part, References
from driftmap.trainer.strategy import process_group
from driftmap.trainer.world import World
from runs import driftmap, launched, wait_until

COLOURS = ("red", "green")
DIT = {"name": "dit", "sample_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 1}
DIT |= {"num_heads": 2, "num_classes": 2}


def write_pictures(folder: Path, count: int, seed: int, *, size: int = 8) -> Path:
    """Write grey pictures of two classes with captions of some words."""
    folder.mkdir()
    draws = np.random.default_rng(seed)

    def samples():
        for number in range(count):
            kind = number % 2
            pixels = (60 + 120 * kind + draws.normal(0, 25, (size, size))).clip(0, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            caption = f"{COLOURS[kind]} {'cat' if number % 3 else 'dog'}"
            yield f"{number:04}", {"png": png.getvalue(), "cls": str(kind).encode(), "txt": caption.encode()}

    write_shard(folder / "shard-000000.tar", samples())
    index_shards(folder, info={"channels": 1, "name": "greys"})
    return folder


def trained(folder: Path, shards: Path, model: dict, objective: str) -> Path:
    """Train some steps, enough for weights that are not those of birth."""
    recipe = {"data": {"shards": str(shards), "batch_size": 16}, "model": model, "optimizer": {"lr": 1e-2}}
    recipe |= {"objective": {"name": objective}, "training": {"steps": 5, "save_every": 5}}
    train(recipe_from(recipe), folder)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    place = tmp_path_factory.mktemp("scene")
    training, _ = write_pictures(place / "training", 60, 0), write_pictures(place / "held-out", 30, 1)
    sees = {"name": "convnet", "channels": 1, "width": 8, "hidden": 8, "num_classes": 2}
    trained(place / "classifier", training, sees, "classifier")
    trained(place / "run", training, DIT, "semigroup")
    return place


def words(scene, run, references, *more, num_samples=45):
    """Return the command that evaluates a run on more samples than there are held-out pictures."""
    options = {"features": scene / "classifier", "held-out": scene / "held-out"}
    options |= {
        "nfe": "1,2",
        "many": 4,
        "num-samples": num_samples,
        "batch-size": 10,
        "references": references,
    }
    return ["evaluate", run, *(f"--{name}={value}" for name, value in options.items()), *more]


def table(run):
    """Return an evaluation without what the clock says, its numbers by their places."""
    found = json.loads((run / "evaluation.json").read_text())
    numbers = {
        ("floor", name, key): value for name, row in found.pop("floor").items() for key, value in row.items()
    }
    for row in found.pop("rows"):
        row.pop("seconds_per_sample")
        numbers |= {
            (row["model"], row["nfe"], key): value
            for key, value in row.items()
            if key not in ("model", "nfe", "sampler")
        }
    return found, numbers


@pytest.fixture(scope="module")
def evaluated(scene):
    """Evaluate one run in one process and in two; each measures its own references."""
    commands = {}
    for number in (1, 2):
        run = scene / f"run-{number}"
        shutil.copytree(scene / "run", run)
        command = words(scene, run, scene / f"references-{number}")
        logs = scene / f"logs-{number}"
        commands[number] = (
            launched(2, *command, logs=logs) if number == 2 else [driftmap(*command, logs=logs)]
        )
    return {number: [command.succeeded() for command in each] for number, each in commands.items()}


def test_two_processes_give_the_table_and_the_pictures_of_one(scene, evaluated):
    (one, numbers), (two, others) = (table(scene / f"run-{number}") for number in (1, 2))
    assert one == two
    assert one["jumps"]["num_samples"] == 64 and one["jumps"]["grids"].keys() == {"2"}
    assert others.keys() == numbers.keys() and len(numbers) > 50
    for place, value in numbers.items():
        assert others[place] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), place
    pictures = [
        {file.name: file.read_bytes() for file in (scene / f"run-{n}" / "samples").iterdir()} for n in (1, 2)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 6
    assert "floor" in evaluated[2][0].stdout and evaluated[2][1].stdout == "", "one process tells for all"


def test_features_are_kept_in_the_order_of_samples(scene, evaluated):
    """Those that two processes measured are bitwise those of one; sums agree to the last digits."""
    folders = [scene / f"references-{number}" for number in (1, 2)]
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 2, "held-out and training pictures"
    for name in names[0]:
        one, two = (load_file(folder / name) for folder in folders)
        assert torch.equal(one["points"], two["points"])
        assert torch.allclose(one["scatter"], two["scatter"], rtol=1e-12)


def test_a_table_says_what_it_was_made_with(scene, evaluated):
    found, numbers = table(scene / "run-1")
    assert found["features"] == "64 convolutional features of a classifier trained on greys"
    card = json.loads((scene / "held-out" / "dataset.json").read_text())
    wanted = {"num_samples": 45, "num_references": 30, "num_compared": 30, "seed": 0, "guidance": 1.0}
    wanted |= {"autoencoder": None, "reference": card["fingerprint"], "many_nfe": 4}
    assert {name: found[name] for name in wanted} == wanted
    assert len(found["features_hash"]) == 16
    assert (scene / "references-1" / f"{found['reference_statistics']}.safetensors").is_file()
    assert "frechet" in found["blind"] and numbers["teacher", 4, "ratio"] is None, "five steps teach little"
    assert "BLIND: " in evaluated[1][0].stdout


def test_what_was_measured_once_is_read_and_checked(scene, evaluated, tmp_path):
    run, references = scene / "run-1", tmp_path / "references"
    shutil.copytree(scene / "references-1", references)
    before, told = table(run)
    files = sorted(references.iterdir())
    times = {file: file.stat().st_mtime_ns for file in files}
    again = words(scene, run, references)
    assert driftmap(*again, logs=tmp_path / "logs").succeeded().stderr == ""
    assert {file: file.stat().st_mtime_ns for file in files} == times and table(run) == (before, told)
    damaged, cut = files
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cut.write_bytes(cut.read_bytes()[:-9])
    warned = driftmap(*again, logs=tmp_path / "logs").succeeded().stderr
    assert f"{damaged} is not what was written there; its pictures are measured again" in warned
    assert f"{cut} cannot be read" in warned
    assert damaged.read_bytes() == whole and table(run) == (before, told)


def test_other_features_have_other_references(scene, evaluated, tmp_path):
    run, references = scene / "run-1", scene / "references-1"
    before = set(references.iterdir())
    out = tmp_path / "evaluation.json"
    clip = write_clip(tmp_path / "clip")
    options = (f"--features=clip:{clip}", "--captions", clip, "--out", out, "--probe", scene / "classifier")
    driftmap(*words(scene, run, references), *options, logs=tmp_path / "logs").succeeded()
    assert len(set(references.iterdir()) - before) == 2
    found = json.loads(out.read_text())
    assert found["features"] == "CLIP 1 layers"
    for values in (*found["rows"], *found["floor"].values()):
        assert {"class_accuracy", "caption_alignment", "caption_alignment_shuffled"} <= values.keys()


def test_answers_about_another_label_are_other_answers(scene):
    shards, device = ShardSet.open(scene / "held-out"), torch.device("cpu")
    judge = Judge(features_named(str(scene / "classifier"), device=device))
    references = References(judge, Dealer(World(process_group()), 10), scene, None, None)
    parts = [Part(each, 30) for each in (shards, replace(shards, label="json:style"))]
    assert references.about(parts[0]) != references.about(parts[1])
    assert references.about(parts[0]) == references.about(Part(ShardSet.open(scene / "held-out"), 30))
    assert references.about(parts[0]) != references.about(Part(shards, 29))


def test_what_pictures_were_asked_for_goes_round_and_is_shuffled_among_them(scene):
    part = Part(ShardSet.open(scene / "held-out"), 30)
    places = np.array([3, 4, 33, 63])
    labels = part.labels(places)
    assert labels is not None and labels.tolist() == [1, 0, 1, 1]
    own = part.captions(np.arange(30))
    assert part.captions(places) == [own[3], own[4], own[3], own[3]]
    shuffled = part.captions(np.arange(30), shuffled=True)
    assert sorted(shuffled) == sorted(own) and shuffled != own
    assert part.captions(places, shuffled=True)[2] == shuffled[3]


def test_a_signal_to_one_process_ends_both_and_leaves_nothing_half_written(scene, tmp_path):
    run, references = tmp_path / "run", tmp_path / "references"
    shutil.copytree(scene / "run", run)
    commands = launched(2, *words(scene, run, references, num_samples=20_000), logs=tmp_path / "logs")
    wait_until(lambda: references.is_dir() and len(list(references.glob("*.safetensors"))) == 2)
    os.kill(commands[1].process.pid, signal.SIGTERM)
    assert [command.ended() for command in commands] == [130, 130]
    assert not (run / "evaluation.json").exists() and not (run / "samples").exists()
    assert {file.suffix for file in references.iterdir()} == {".safetensors"}
    assert all("Traceback" not in command.stderr for command in commands)


def test_pictures_of_another_size_are_refused(scene, tmp_path):
    """A network that resizes would compare them, and give a number that means nothing."""
    other = write_pictures(tmp_path / "other", 12, 0, size=9)
    command = words(scene, scene / "run", tmp_path / "references")
    message = driftmap(*command, f"--held-out={other}", logs=tmp_path / "logs").refused()
    assert "pictures of shape (1, 8, 8)" in message and "have (1, 9, 9); give held-out pictures" in message


def test_a_run_of_another_kind_has_no_features(scene):
    with pytest.raises(
        ConfigError, match="run is no run of a classifier; train one with .*or give the run of"
    ):
        features_named(str(scene / "run"), device=torch.device("cpu"))


def test_a_denoiser_is_evaluated_by_its_own_samplers(scene):
    run = trained(scene / "ddpm", scene / "training", DIT, "ddpm")
    command = words(scene, run, scene / "references-ddpm", num_samples=12)
    driftmap(*command, logs=scene / "logs-ddpm").succeeded()
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    found = [(row["model"], row["sampler"], row["nfe"]) for row in rows]
    assert found == [("teacher", "dpm_solver", 4), ("teacher", "ddim", 1), ("teacher", "ddim", 2)]
