"""Latent shards of a run's autoencoder: their scale, their statistics, and the way back to its weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..data.batch import ordered
from ..data.encode import encode_shards
from ..data.shards import CARD, ShardSet
from ..models.autoencoder import encode_moments
from .build import load_model
from .checkpoint import fingerprint
from .config import ConfigError

STATISTICS_SAMPLES = 2048


def encode_latents(
    source: ShardSet, out: Path, *, autoencoder: Path, progress: Callable[[int], None] | None = None
) -> ShardSet:
    """Encode pictures by the autoencoder of a run and return the latent shard set.

    A complete set of the same pictures and autoencoder is left alone. The set's card says which autoencoder
    made it and how latents get zero mean and unit variance, (z - shift_factor) * scaling_factor, measured on
    the first samples.
    """
    model = load_autoencoder(autoencoder)
    if (out / CARD).is_file():
        made = ShardSet.open(out)
        if (made.info.get("encoder"), made.info.get("encoded_from")) == (
            fingerprint(model),
            source.fingerprint,
        ):
            return made
    info = {**source.info, "encoder": fingerprint(model), "latents": latent_statistics(model, source)}
    info["latents"]["autoencoder"] = str(autoencoder)
    return encode_shards(
        source, out, encode=lambda pictures: encode_moments(model, pictures), info=info, progress=progress
    )


def latent_statistics(model: AutoencoderKL, source: ShardSet) -> dict[str, Any]:
    """Return scale and shift of the latents of the first samples, and their mean and std by channel."""
    means, variances, seen = [], [], 0
    for batch in ordered(source, 256):
        mean, std = encode_moments(model, batch["data"])
        means.append(mean)
        variances.append(std.square())
        seen += len(mean)
        if seen >= STATISTICS_SAMPLES:
            break
    mean, variance = torch.cat(means).double(), torch.cat(variances).double()
    shift = mean.mean().item()
    spread = math.sqrt((mean.var() + variance.mean()).item())
    return {
        "scaling_factor": 1 / spread,
        "shift_factor": shift,
        "channel_mean": mean.mean((0, 2, 3)).tolist(),
        "channel_std": (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt().tolist(),
    }


def load_autoencoder(run: Path) -> AutoencoderKL:
    """Return the autoencoder of a run, ready for evaluation."""
    model = load_model(run)
    if not isinstance(model, AutoencoderKL):
        raise ConfigError(f"{run} is no run of an autoencoder; give the folder of one")
    return model


def autoencoder_of(latents: ShardSet, run: Path | None = None) -> AutoencoderKL:
    """Return the autoencoder that made a latent shard set, with the set's scale and shift in its config.

    Raises ConfigError if the run's weights are not the ones that encoded the set.
    """
    if "latents" not in latents.info:
        raise ConfigError(
            f"{latents.folder} holds no latents of an autoencoder; it was not made by shards encode"
        )
    statistics = latents.info["latents"]
    run = run or Path(statistics["autoencoder"])
    model = load_autoencoder(run)
    if fingerprint(model) != latents.info["encoder"]:
        raise ConfigError(
            f"{latents.folder} was encoded by the autoencoder {latents.info['encoder']}, but {run} holds "
            f"{fingerprint(model)}; give the right run, or encode the pictures again"
        )
    model.register_to_config(
        scaling_factor=statistics["scaling_factor"], shift_factor=statistics["shift_factor"]
    )
    return model
