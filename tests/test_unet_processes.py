"""A two-time U-Net trains under every strategy what one process trains, also through its derivative."""

import functools
from pathlib import Path
from typing import Any

import pytest
from latents import write_latents

from driftmap.trainer.checkpoint import newest
from runs import driftmap, launched, read_losses, write_config

UNET = {"name": "unet", "sample_size": 4, "in_channels": 2, "block_out_channels": [8, 16], "num_classes": 2}
UNET |= {"layers_per_block": 1, "head_width": 8, "norm_num_groups": 4}
OBJECTIVES = {
    "semigroup": {"name": "semigroup"},
    "residual": {"name": "lagrangian", "gradient": "residual"},
    "semigradient": {"name": "lagrangian", "gradient": "semigradient"},
}
CASES = [("fsdp", "residual"), ("fsdp", "semigroup"), ("zero2", "semigradient"), ("zero3", "semigradient")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    write_latents(folder / "latents")
    return folder


def config_of(folder: Path, objective: str) -> Path:
    settings: dict[str, Any] = {"data__batch_size": 12, "model": UNET, "objective": OBJECTIVES[objective]}
    settings["optimizer"] = {"lr": 1e-3, "clip_norm": 0.5}
    settings["training"] = {"steps": 6, "save_every": 6, "log_every": 1}
    return write_config(folder / f"{objective}.yaml", folder / "latents", **settings)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """Return a function: the run of one process for an objective."""

    @functools.cache
    def train(objective: str) -> Path:
        run = folder / f"alone-{objective}"
        driftmap("train", config_of(folder, objective), "--out", run, logs=folder / "logs").succeeded()
        return run

    return train


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = read_losses(run), read_losses(other)
    for step in range(1, 7):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5, abs=1e-7), step
    saved, expected = newest(run).weights("model"), newest(other).weights("model")
    for name, value in expected.items():
        # Attention does not see the bias of the keys: its gradient is rounding, whose sign Adam obeys.
        if not name.endswith("to_k.bias"):
            assert (saved[name] - value).norm() <= 1e-4 * value.norm().clamp_min(1e-2), name


@pytest.mark.parametrize(("strategy", "objective"), CASES)
def test_two_processes_train_what_one_trains(strategy: str, objective: str, folder: Path, alone: Any) -> None:
    run = folder / f"{strategy}-{objective}"
    words = ("train", config_of(folder, objective), f"strategy.name={strategy}", "--out", run)
    for command in launched(2, *words, logs=run):
        command.succeeded()
    assert_same(run, alone(objective))


@pytest.mark.parametrize(
    "settings",
    [("strategy.name=fsdp", "training.recompute_every=2"), ("training.attention=math",)],
    ids=["recomputed", "math"],
)
def test_settings_that_change_no_result(settings: tuple[str, ...], folder: Path, alone: Any) -> None:
    run = folder / settings[-1].replace("=", "-")
    for command in launched(2, "train", config_of(folder, "residual"), *settings, "--out", run, logs=run):
        command.succeeded()
    assert_same(run, alone("residual"))
