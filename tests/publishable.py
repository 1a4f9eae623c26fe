"""Small runs that can be published: an autoencoder, and a DiT and a U-Net of its latents of digits."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from driftmap.data.sources import digits, make_shards
from driftmap.trainer.build import train
from driftmap.trainer.config import read_config
from driftmap.trainer.encode import encode
from driftmap.trainer.recipe import recipe_from
from run_folders import make_evaluation
from runs import write_config

AUTOENCODER = {"name": "autoencoder_kl", "in_channels": 1, "out_channels": 1, "latent_channels": 2}
AUTOENCODER |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
AUTOENCODER |= {
    "block_out_channels": [4, 4, 4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 32,
}
DIT = {"name": "dit", "sample_size": 8, "in_channels": 2, "width": 16, "depth": 1, "num_heads": 2}
UNET = {
    "name": "unet",
    "sample_size": 8,
    "in_channels": 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
}
UNET |= {"attention_levels": [1], "head_width": 4, "norm_num_groups": 2}


def make_runs(folder: Path) -> Path:
    """Train for three steps each: an autoencoder, a teacher, a DiT taught by it, and a U-Net."""
    source = digits("held_out")
    few = replace(source, samples=lambda: islice(source.samples(), 60), num_samples=60)
    pictures = make_shards(few, folder / "pictures")
    trained(folder, "autoencoder", "pictures", AUTOENCODER, {"name": "autoencoder"})
    encode(pictures, folder / "latents", autoencoder=folder / "autoencoder")
    objective = {"name": "flow_matching", "condition_dropout": 0.1}
    trained(folder, "teacher", "latents", {**DIT, "num_classes": 10}, objective)
    taught = {"teacher": {"run": str(folder / "teacher"), "guidance": 2.0}}
    started = {"from_run": str(folder / "teacher")}
    trained(folder, "dit", "latents", started, {"name": "semigroup"}, **taught)
    trained(folder, "unet", "latents", {**UNET, "num_classes": 10}, {"name": "semigroup"})
    for name in ("dit", "unet"):
        make_evaluation(folder / name / "evaluation.json")
    return folder


def trained(folder: Path, name: str, shards: str, model: dict, objective: dict, **sections: dict) -> None:
    """Train one run for three steps."""
    steps = {"training__steps": 3, "training__save_every": 3, "data__batch_size": 8}
    config = write_config(
        folder / f"{name}.yaml", folder / shards, model=model, objective=objective, **steps, **sections
    )
    train(recipe_from(read_config(config)), folder / name)
