"""The whole line holds together: every stage of the quickstart, a few steps each, on the real digits.

How good the result is after a full quickstart is held by check_quickstart.py, which CI runs on the real one.
"""

import json
from pathlib import Path

import pytest
import torch

from driftmap.data.batch import ordered
from driftmap.data.shards import ShardSet
from driftmap.launch.export import check_export, export
from driftmap.launch.quickstart import quickstart
from driftmap.trainer.build import load_model
from driftmap.trainer.config import ConfigError
from driftmap.trainer.encode import autoencoder_of
from driftmap.trainer.latents import Preparation

FEW = ["training.steps=3", "optimizer.warmup_steps=0", "data.batch_size=16"]


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    out = tmp_path_factory.mktemp("line")
    quickstart(out, overrides=FEW, num_samples=40)
    return out


def test_the_evaluation_has_a_row_for_every_model_and_number_of_evaluations(line):
    evaluation = json.loads((line / "evaluation.json").read_text())
    rows = {(row["model"], row["nfe"]) for row in evaluation["rows"]}
    assert rows == {("teacher", 32)} | {
        (model, nfe) for model in ("teacher", "student") for nfe in (1, 2, 4, 8)
    }
    assert evaluation["num_samples"] == 40 and "FID" not in evaluation["features"]
    assert set(evaluation["floor"]) == {"self", "reconstruction"}
    many = evaluation["rows"][0]
    assert many["ratio"] == (None if "frechet" in evaluation["blind"] else 1)
    assert many["endpoint_error"] == 0


def test_teacher_and_student_start_from_the_same_noise(line):
    """After three steps a student nearly is its teacher: one jump ends where one Euler step does."""
    rows = {
        (row["model"], row["nfe"]): row for row in json.loads((line / "evaluation.json").read_text())["rows"]
    }
    assert rows["student", 1]["frechet"] == pytest.approx(rows["teacher", 1]["frechet"], rel=0.3)


def test_the_second_time_nothing_is_done_again(line):
    logs = {file: file.read_bytes() for file in line.glob("*/log.jsonl")}
    weights = {file: file.stat().st_mtime_ns for file in line.glob("*/checkpoints/*/model-*.safetensors")}
    quickstart(line, overrides=FEW, num_samples=40)
    assert logs == {file: file.read_bytes() for file in line.glob("*/log.jsonl")} and len(logs) == 4
    assert weights == {file: file.stat().st_mtime_ns for file in weights}


def test_the_pipeline_samples_like_the_trainer_where_driftmap_cannot_be_imported(line):
    assert check_export(line / "pipeline", line / "flow-map-semigroup", steps=1) <= 1e-5


def test_an_export_of_other_weights_is_told_apart(line):
    """The comparison can fail: the teacher's pipeline does not give the student's samples."""
    export(line / "teacher", line / "other")
    with pytest.raises(ValueError, match="gives other samples"):
        check_export(line / "other", line / "flow-map-semigroup")


def test_an_export_never_replaces_a_folder_of_something_else(line):
    with pytest.raises(ConfigError, match="is no exported pipeline"):
        export(line / "teacher", line / "pictures")
    assert (line / "pictures" / "dataset.json").is_file()


def test_latents_have_zero_mean_and_unit_variance(line):
    latents = ShardSet.open(line / "latents")
    autoencoder = autoencoder_of(latents)
    statistics = latents.info["latents"]
    assert autoencoder.config["scaling_factor"] == statistics["scaling_factor"]
    prepare = Preparation.of(latents.info, seed=0, device=torch.device("cpu"))
    data = torch.cat([prepare(batch).data for batch in ordered(latents, 500)])
    assert abs(data.mean().item()) < 0.02 and abs(data.std().item() - 1) < 0.02


def test_latents_of_another_autoencoder_are_refused(line, tmp_path: Path):
    with pytest.raises(ConfigError, match="is no run of an autoencoder"):
        autoencoder_of(ShardSet.open(line / "latents"), line / "teacher")
    assert load_model(line / "teacher").sample_shape == (4, 8, 8)
