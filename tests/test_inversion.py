"""`driftmap invert`: the same network carries data to noise and back, and says what is lost on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from driftmap.data.shards import ShardSet
from driftmap.data.sources import digits, make_shards
from driftmap.launch.cli import main
from driftmap.launch.inversion import InversionRequest, invert_run
from driftmap.models.flow_map import FlowMap
from driftmap.models.samplers import euler, heun, jump
from driftmap.trainer.build import train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.encode import encode
from driftmap.trainer.inversion import measure_round_trips, psnr, round_trip
from driftmap.trainer.recipe import recipe_from
from oracle import PATHS, GaussianBackbone, exact, gaussian_batch
from runs import write_config

ALONG = {"linear": PATHS["line"], "trig": PATHS["quarter circle"]}
DIT = {"name": "dit", "sample_size": 32, "in_channels": 1, "patch_size": 8, "width": 16, "depth": 1}
DIT |= {"num_heads": 2, "num_classes": 10}
AUTOENCODER = {"name": "autoencoder_kl", "in_channels": 1, "out_channels": 1, "latent_channels": 2}
AUTOENCODER |= {"block_out_channels": [4, 4], "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 32}
AUTOENCODER |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
AUTOENCODER |= {"mid_block_add_attention": False}


def lost(model: FlowMap, sample: Any, num_steps: int, start: float = 0.01) -> dict[str, Any]:
    batches = [gaussian_batch(512).take(torch.arange(first, first + 128)) for first in range(0, 512, 128)]
    row, shown = measure_round_trips(model, batches, sample, num_steps=num_steps, start=start, pictures=None)
    assert shown is None and row.pop("psnr") is None
    return row


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("path", ["linear", "trig"])
def test_an_exact_map_loses_nothing_and_its_noise_is_normal(path: Any, num_steps: int) -> None:
    """The noise is that of the data, keyed by the sample; its spread is 1 within four standard errors."""
    row = lost(FlowMap(GaussianBackbone(path=path), ALONG[path]), jump, num_steps)
    assert row["round_trip_error"] < 1e-12
    count = 512 * 5
    assert abs(row["noise_mean"]) < 4 / count**0.5 and abs(row["noise_std"] - 1) < 4 / (2 * count) ** 0.5


def test_every_part_is_the_written_out_one() -> None:
    model, batch, start = exact(), gaussian_batch(16), 0.05
    trip = round_trip(model, batch, jump, num_steps=2, start=start)
    drawn = batch.random.normal("first noise", (5,)).double()
    state = (1 - start) * batch.data + start * drawn
    torch.testing.assert_close(trip.state, state)
    spread = ((0.95 * 0.4) ** 2 + start**2) ** 0.5
    noise = (state - 0.95 * 0.7) / spread
    torch.testing.assert_close(trip.noise, noise)
    torch.testing.assert_close(trip.back, state)
    torch.testing.assert_close(trip.data, 0.7 + 0.4 * noise)


@pytest.mark.parametrize("sample, order", [(euler, 1), (heun, 3)])
def test_a_teacher_comes_back_at_an_odd_order(sample: Any, order: int) -> None:
    """Heun's leading error is h^2 on either way, once with each sign: there and back it is away."""
    coarse, fine = (lost(exact(), sample, count)["round_trip_error"] for count in (40, 80))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


class Forward(GaussianBackbone):
    """Exact from noise to data, and has not learned the way back."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, torch.minimum(s, t), condition)


def test_a_map_that_goes_only_one_way_is_seen() -> None:
    row = lost(FlowMap(Forward()), jump, 4)
    assert row["round_trip_error"] > 0.1 and abs(row["noise_std"] - 1) > 0.1


def test_psnr_is_that_of_torchmetrics() -> None:
    given, found = torch.rand(4, 3, 8, 8) * 2 - 1, torch.rand(4, 3, 8, 8) * 2 - 1
    expected = peak_signal_noise_ratio(found, given, data_range=2.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(found, given), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """Return a folder with digits, their latents, and short runs on both."""
    folder = tmp_path_factory.mktemp("inversion")
    make_shards(digits("held_out"), folder / "digits")

    def trained(name: str, shards: str, model: dict[str, Any], objective: str) -> None:
        settings = {"model": model, "objective": {"name": objective}}
        config = write_config(folder / f"{name}.yaml", folder / shards, **settings)
        train(recipe_from(read_config(config, ["data.batch_size=8"])), folder / name)

    trained("flow", "digits", DIT, "flow_matching")
    trained("student", "digits", DIT, "semigroup")
    trained("ddpm", "digits", DIT, "ddpm")
    trained("autoencoder", "digits", AUTOENCODER, "autoencoder")
    encode(ShardSet.open(folder / "digits"), folder / "latents", autoencoder=folder / "autoencoder")
    trained("latent", "latents", DIT | {"sample_size": 16, "in_channels": 2}, "semigroup")
    return folder


def test_the_command_writes_a_table_and_pictures(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["invert", home / "flow", "--data", home / "digits", "--nfe", "2,8", "--sampler", "heun"]
    words += ["--num-samples", 20, "--out", home / "out" / "heun.json"]
    monkeypatch.setattr("sys.argv", ["driftmap", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "noise std" in capsys.readouterr().out
    told = json.loads((home / "out" / "heun.json").read_text())
    assert {key: told[key] for key in ("sampler", "start", "num_samples", "space")} == {
        "sampler": "heun",
        "start": 0.01,
        "num_samples": 20,
        "space": "pixels",
    }
    rows = {row["nfe"]: row for row in told["rows"]}
    assert rows[8]["round_trip_error"] < rows[2]["round_trip_error"] / 4
    assert rows[8]["psnr"] > rows[2]["psnr"] + 3
    picture = np.asarray(Image.open(home / "flow" / "samples" / "round-trip-008.png").convert("L"))
    given, found = picture[:32].astype(int), picture[-32:].astype(int)
    assert picture.shape[1] > 10 * 32 and np.abs(given - found).mean() < 20 < given.std()


@pytest.mark.parametrize("run, sampler", [("flow", "euler"), ("student", "jump"), ("ddpm", "jump")])
def test_any_run_is_inverted_and_no_batch_changes_a_number(home: Path, run: str, sampler: str) -> None:
    request = {"run": home / run, "data": home / "digits", "nfe": (2,), "num_samples": 12}
    told = invert_run(InversionRequest(**request), home / "a.json")
    assert told["sampler"] == sampler and np.isfinite(list(told["rows"][0].values())).all()
    again = invert_run(InversionRequest(**request, batch_size=5), home / "b.json")
    assert again["rows"][0] == pytest.approx(told["rows"][0], rel=1e-4, abs=1e-6)
    other = invert_run(InversionRequest(**request, seed=1), home / "b.json")
    assert other["rows"][0]["data_error"] != told["rows"][0]["data_error"]


def test_latents_are_compared_as_pictures(home: Path) -> None:
    request = InversionRequest(home / "latent", home / "latents", nfe=(4,), num_samples=8)
    told = invert_run(request, home / "latent.json")
    assert told["space"].startswith("latents (z - ") and told["rows"][0]["psnr"] > 0
    picture = Image.open(home / "latent" / "samples" / "round-trip-004.png")
    assert picture.size == (8 * 32 + 7 * 2, 32 + 2 + 32)


@pytest.mark.parametrize(
    "run, settings, message",
    [
        (
            "flow",
            {"sampler": "ddpm"},
            "--sampler ddpm goes only from noise to data; there are jump, euler, heun",
        ),
        ("flow", {"sampler": "heun", "nfe": (2, 3)}, "--nfe 3: a step of heun takes 2 evaluations"),
        ("ddpm", {"sampler": "heun", "nfe": (2,)}, "at t = 0, which a denoiser does not learn; take jump"),
        ("flow", {"start": 0.0}, "--start 0: expected a time above 0"),
        ("latent", {}, "takes samples of shape"),
    ],
)
def test_a_mistake_is_answered(home: Path, run: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        invert_run(InversionRequest(home / run, home / "digits", **settings), home / "no.json")
    assert message in str(refused.value)
    assert not (home / "no.json").exists()
