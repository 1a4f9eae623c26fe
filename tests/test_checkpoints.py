"""A checkpoint is whole or it is not used, and a run never loses more than it says."""

import functools
import os
import re
import resource
import shutil
import subprocess

import pytest

from driftmap.data.synthetic import write_points
from driftmap.trainer.checkpoint import verify
from runs import checkpoints, driftmap, read_losses, tree, write_config

FOUR, SIX = "step-00000004", "step-00000006"
MODEL, EMA, OPTIMIZER = (f"{kind}-00001-of-00001.safetensors" for kind in ("model", "ema", "optimizer"))
FILES = (MODEL, EMA, OPTIMIZER, "state.json", "manifest.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train six steps, with the checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    points = write_points(folder / "moons", "moons", n=100, seed=0)
    config = write_config(folder / "config.yaml", points.folder)
    train(config, folder / "run").succeeded()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """Copy the finished run, to be damaged."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def train(config, run, *overrides, **disturbance):
    logs = run.parent / f"{run.name}.logs"
    return driftmap("train", config, *overrides, "--out", run, logs=logs, **disturbance)


def flip(file, place=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


# Damage


@pytest.mark.parametrize("damage", [flip, cut, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_seen(name, damage, copy):
    folder = copy / "checkpoints" / SIX
    assert verify(folder) is None
    damage(folder / name)
    assert str(folder) in verify(folder)


def test_a_flipped_byte_anywhere_in_a_manifest_is_seen(copy):
    file = copy / "checkpoints" / SIX / "manifest.json"
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        flip(file, place)
        assert verify(file.parent) is not None, place
        file.write_bytes(whole)
    assert verify(file.parent) is None


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"state.json": {}}'])
def test_a_manifest_that_lists_something_else_is_no_manifest(text, copy):
    file = copy / "checkpoints" / SIX / "manifest.json"
    file.write_text(text)
    assert "does not list" in verify(file.parent)


@pytest.mark.parametrize("name", [EMA, "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_loudly_and_made_anew(name, copy, finished):
    before = checkpoints(copy)
    cut(copy / "checkpoints" / SIX / name)
    command = train(finished / "config.yaml", copy).succeeded()
    assert command.stderr.count("warning: ") == 1
    assert f"{SIX}/{name}" in command.stderr and f"using {FOUR}" in command.stderr
    assert checkpoints(copy) == before
    assert verify(copy / "checkpoints" / SIX) is None
    assert read_losses(copy) == read_losses(finished / "run")


def test_where_all_are_damaged_nothing_begins_anew(copy, finished):
    cut(copy / "checkpoints" / SIX / MODEL)
    os.remove(copy / "checkpoints" / FOUR / "manifest.json")
    before = tree(copy)
    message = train(finished / "config.yaml", copy).refused()
    assert "no checkpoint is whole" in message and SIX in message and FOUR in message
    assert "restore one from a copy" in message
    assert tree(copy) == before


# Pruning and leftovers


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest(keep, finished, tmp_path):
    train(finished / "config.yaml", tmp_path / "run", f"training.keep={keep}", "training.steps=8").succeeded()
    steps = [2, 4, 6, 8][-keep:]
    assert list(checkpoints(tmp_path / "run")) == [f"step-{step:08d}" for step in steps]


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(copy, finished):
    whole = checkpoints(copy)
    for leftover in ("step-00000007.tmp", "step-00000002.removed"):
        shutil.copytree(copy / "checkpoints" / FOUR, copy / "checkpoints" / leftover)
    command = train(finished / "config.yaml", copy).succeeded()
    assert command.stderr == "" and {**checkpoints(copy)}.items() >= whole.items()
    train(finished / "config.yaml", copy, "training.steps=7").succeeded()
    assert list(checkpoints(copy)) == [SIX, "step-00000007"]


# Checkpoints of something else


def test_a_checkpoint_of_another_model_is_told_by_its_differences(copy, finished, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", finished / "moons", model__width=8, model__depth=0, model__num_classes=0
    )
    shutil.move(copy / "checkpoints", tmp_path / "other" / "checkpoints")
    before = tree(tmp_path)
    message = train(config, tmp_path / "other").refused()
    assert "checkpoint of another model" in message and SIX in message
    assert "unexpected backbone.blocks.0.layers.1.weight" in message and "more" in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["dataset", "seed"])
def test_a_checkpoint_of_another_stream_is_refused(what, copy, finished, tmp_path):
    changes = {"seed": 1} if what == "seed" else {}
    shards = finished / "moons"
    if what == "dataset":
        shards = write_points(tmp_path / "moons", "moons", n=100, seed=1).folder
    config = write_config(tmp_path / "config.yaml", shards, **changes)
    (copy / "recipe.yaml").unlink()
    before = tree(tmp_path)
    message = train(config, copy).refused()
    assert f"was made with {what}" in message and SIX in message and "new run folder" in message
    assert tree(tmp_path) == before


def test_another_recipe_in_the_same_folder_is_refused_with_its_places(copy, finished):
    before = tree(copy)
    message = train(
        finished / "config.yaml", copy, "optimizer.lr=2e-2", "model.width=8", "training.precision=bf16"
    ).refused()
    for text in (
        "optimizer.lr is 0.01 there, 0.02 here",
        "model.width is 16 there, 8 here",
        "training.precision is 'fp32' there, 'bf16' here",
    ):
        assert text in message
    assert "another --out" in message
    assert tree(copy) == before


def test_periods_and_steps_may_change(copy, finished):
    train(
        finished / "config.yaml", copy, "training.steps=9", "training.save_every=3", "training.keep=3"
    ).succeeded()
    assert list(checkpoints(copy)) == [FOUR, SIX, "step-00000009"]


# Full disks


def limit_files(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_a_file_that_cannot_be_written_whole_is_a_message(copy, finished):
    before = tree(copy)
    sizes = {name: digest["bytes"] for name, digest in checkpoints(copy)[SIX].items()}
    limit = (sizes[MODEL] + sizes[OPTIMIZER]) // 2
    message = train(
        finished / "config.yaml", copy, "training.steps=8", before=functools.partial(limit_files, limit)
    ).refused()
    assert "cannot save" in message and "step-00000008" in message and f"({FOUR}, {SIX})" in message
    assert "the same command" in message
    after = tree(copy)
    assert {name: after[name] for name in before if name.startswith("checkpoints/")}.items() <= before.items()
    assert sorted(os.listdir(copy / "checkpoints")) == [FOUR, SIX]
    train(finished / "config.yaml", copy, "training.steps=8").succeeded()
    assert list(checkpoints(copy)) == [SIX, "step-00000008"]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 512 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def leave(disk, num_pages):
    """Fill a disk up to a number of pages."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk)
    ballast.write_bytes(bytes((free.f_bavail - num_pages) * free.f_bsize))


def test_a_full_disk_is_a_message_and_the_run_goes_on_after_it(small_disk, finished):
    run = small_disk / "run"
    train(finished / "config.yaml", run, "training.steps=4").succeeded()
    before = tree(run / "checkpoints")
    long = ("training.steps=500", "training.save_every=500")  # whose log does not fit
    written = set()
    for num_pages, *overrides in ((0,), (1, *long), (2,), (4,), (6,), (8,)):
        leave(small_disk, num_pages)
        logs = finished / "full_disk.logs"
        command = driftmap("train", finished / "config.yaml", *overrides, "--out", run, logs=logs)
        message = command.refused()
        assert "No space left" in message and "same command" in message
        written.add(re.search(rf"cannot (write|save) {run}/([a-z.]+)", message)[2])
        assert tree(run / "checkpoints") == before
    assert (
        {"recipe.yaml", "checkpoints"} < written <= {"recipe.yaml", "log.jsonl", "tensorboard", "checkpoints"}
    )
    (small_disk / "ballast").unlink()
    train(finished / "config.yaml", run).succeeded()
    assert checkpoints(run)[SIX] == checkpoints(finished / "run")[SIX]


def test_a_teacher_that_trained_on_is_refused(finished, tmp_path):
    """A student that goes on under another teacher would be neither run."""
    shards = finished / "moons"
    teacher = write_config(tmp_path / "teacher.yaml", shards)
    train(teacher, tmp_path / "teacher").succeeded()
    objective = {"objective__name": "semigroup", "teacher__run": str(tmp_path / "teacher")}
    student = write_config(tmp_path / "student.yaml", shards, training__steps=2, **objective)
    train(student, tmp_path / "student").succeeded()
    longer = write_config(tmp_path / "longer.yaml", shards, training__steps=8)
    train(longer, tmp_path / "teacher").succeeded()
    message = train(student, tmp_path / "student").refused()
    assert "was made with teacher" in message and "new run folder" in message
