"""What is no checkpoint that can be trained from, or a damaged one, is told: what, where, and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import section, text_encoder, write_pipeline, write_shards
from torch import nn

from driftmap.models.denoiser import Denoiser
from driftmap.models.path import expand
from driftmap.models.schedule import ScaledLinearBetas
from driftmap.trainer.build import check_inputs
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.objective import Batch
from driftmap.trainer.pretrained import check_prediction
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from runs import write_config

STEM = "diffusion_pytorch_model"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_pipeline(root / "sd", "sd")
    write_shards(root / "shards", root / "sd", n=8)
    return root


def config(part: str, file: str = "config.json", **changes: Any) -> Change:
    """Return what rewrites some settings of a part of a pipeline."""

    def change(folder: Path) -> None:
        place = folder / part / file
        place.write_text(json.dumps(json.loads(place.read_text()) | changes))

    return change


def scheduler(**changes: Any) -> Change:
    return config("scheduler", "scheduler_config.json", **changes)


def weights(function: Callable[[dict[str, torch.Tensor]], Any], name: str = f"{STEM}.safetensors") -> Change:
    """Return what rewrites the network's weights by a function."""

    def change(folder: Path) -> None:
        found = load_file(folder / "unet" / f"{STEM}.safetensors")
        function(found)
        save_file(found, folder / "unet" / name)

    return change


def without(part: str) -> Change:
    return lambda folder: shutil.rmtree(folder / part)


def pickled(folder: Path) -> None:
    file = folder / "unet" / f"{STEM}.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def truncated(folder: Path) -> None:
    file = folder / "unet" / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "unet" / f"{STEM}.safetensors").write_text(text)


def a_shard_lost(folder: Path) -> None:
    found = load_file(folder / "unet" / f"{STEM}.safetensors")
    (folder / "unet" / f"{STEM}.safetensors").unlink()
    parts = {name: f"{STEM}-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(found)}
    index = folder / "unet" / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    first = {name: value for name, value in found.items() if parts[name].startswith(f"{STEM}-00001")}
    save_file(first, folder / "unet" / f"{STEM}-00001-of-00002.safetensors")


def only_a_variant(folder: Path) -> None:
    place = folder / "unet"
    (place / f"{STEM}.safetensors").rename(place / f"{STEM}.fp16.safetensors")


WRONG: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, "model.from_pretrained: there is no folder .*; give a diffusers pipeline"),
    "no network": (without("unet"), "has neither unet nor transformer .it has .*; give a pipeline folder"),
    "another class": (
        config("unet", _class_name="FluxTransformer2DModel"),
        "holds a FluxTransformer2DModel; ",
    ),
    "a config that is no JSON": (
        lambda folder: (folder / "unet" / "config.json").write_text('{"_class'),
        "unet/config.json cannot be read .*; copy it again",
    ),
    "another way of calling it": (
        config("unet", encoder_hid_dim_type="image_proj", encoder_hid_dim=4),
        "its config.json says encoder_hid_dim 4; networks with encoder_hid_dim other than None cannot",
    ),
    "distilled with a guidance input": (config("unet", time_cond_proj_dim=8), "says time_cond_proj_dim 8"),
    "blocks of another kind": (
        config("unet", down_block_types=["DownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        "has blocks 'SimpleCrossAttnDownBlock2D'",
    ),
    "wrong channels": (
        config("unet", in_channels=9),
        "takes 9 channels, but its autoencoder gives 4: an inpai",
    ),
    "weights in a pickle": (
        pickled,
        "weights in .*bin alone, a pickle, which could run code; it is not opened",
    ),
    "truncated weights": (truncated, "is damaged .*; copy it again"),
    "a pointer of git-lfs": (pointer, "is a pointer of git-lfs, not the weights; run `git lfs pull`"),
    "a shard is lost": (
        a_shard_lost,
        "-00002-of-00002.safetensors is missing, which the index beside it names",
    ),
    "a variant alone": (only_a_variant, "but the variants fp16; set variant to one"),
    "missing weights": (
        weights(lambda found: found.pop("conv_in.bias")),
        "not those of its config.json: missing conv_in.bias. Copy both from one place",
    ),
    "weights too many": (
        weights(lambda found: found.update(more=torch.ones(1))),
        "not those of its config.json: unexpected more",
    ),
    "weights of another shape": (
        config("unet", block_out_channels=[8, 24]),
        r"is \[.*\], expected \[.*\].* and \d+ more. Copy both from one place",
    ),
    "weights that are not finite": (
        weights(lambda found: found["conv_in.bias"].fill_(torch.nan)),
        "conv_in.bias holds numbers that are not finite",
    ),
    "no scheduler": (
        without("scheduler"),
        "has no scheduler/scheduler_config.json, which says what its network",
    ),
    "betas of its own": (
        scheduler(trained_betas=[0.1, 0.2]),
        "says trained_betas; expected a beta_schedule of",
    ),
    "an unknown prediction": (
        scheduler(prediction_type="score"),
        "says prediction_type 'score'; expected one of",
    ),
    "v-prediction trained as noise": (
        scheduler(prediction_type="v_prediction"),
        "objective.prediction: the network of .* was trained for prediction v, not noise; set it to v",
    ),
    "another schedule": (
        scheduler(beta_start=0.001),
        "objective.path: .*first: 0.00085.* was trained along another one; set it to .*first: 0.001",
    ),
    "no text encoder": (without("text_encoder"), "has no text_encoder, so what an empty prompt is"),
    "another text encoder's prompts": (
        lambda folder: text_encoder(16).save_pretrained(folder / "text_encoder"),
        "the captions in .* were encoded by .*, not by the text encoder of .*; encode them with the checkp",
    ),
    "another autoencoder's latents": (
        config("vae", scaling_factor=0.18215),
        "have scale 0.5 and shift 0, but the network of .* knows them by 0.18215 and 0; encode the pictures",
    ),
}


class OfOnes(nn.Module):
    """Predicts the v of data that are 1 everywhere."""

    sample_shape, null_label = (1, 2, 2), None

    def forward(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor, condition: None) -> torch.Tensor:
        """Return alpha noise - sigma data."""
        path = ScaledLinearBetas()
        alpha, sigma = (expand(of(s), x) for of in (path.alpha, path.sigma))
        return alpha * (x - alpha) / sigma - sigma


def test_a_network_of_another_prediction_than_it_is_labelled_is_told() -> None:
    batch = Batch(torch.ones(64, 1, 2, 2), None, Random(0, torch.arange(64)))
    check_prediction(Denoiser(OfOnes(), ScaledLinearBetas(), prediction="v"), batch)
    with pytest.raises(
        ConfigError, match="predicts noise, which misses .* read as v it misses it by 0.00; corr"
    ):
        check_prediction(Denoiser(OfOnes(), ScaledLinearBetas(), prediction="noise"), batch)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_told(name: str, whole: Path, tmp_path: Path) -> None:
    change, message = WRONG[name]
    shutil.copytree(whole / "sd", tmp_path / "sd")
    change(tmp_path / "sd")
    objective = {"name": "ddpm", "prediction": "noise", "path": {"name": "scaled_linear_betas"}}
    model = {"from_pretrained": str(tmp_path / "sd")}
    settings: dict[str, Any] = {f"data__{key}": value for key, value in section("sd").items()}
    settings |= {"data__batch_size": 4, "model": model, "objective": objective}
    file = write_config(tmp_path / "c.yaml", whole / "shards", **settings)
    with pytest.raises(ConfigError, match=message):
        check_inputs(recipe_from(read_config(file)))
