"""A published pipeline of ours as a run's model again, to teach, or to compare with.

What `driftmap export` writes says in `network.json` what its network is. Its weights are read from
safetensors, and none of the code beside them is run.
"""

import json
from pathlib import Path
from typing import Any

from ..data.shards import ShardSet
from ..models.flow_map import FlowMap
from ..models.pretrained import found_folder, read_weights
from .checkpoint import fingerprint, load_weights
from .config import ConfigError
from .start import make_network

NETWORK = "network.json"
NETWORKS = {"dit": "transformer", "unet": "unet"}  # what is published, and where its weights are


def is_published(place: Path | str) -> bool:
    """Return whether a place, a folder or an id on the Hub, is a pipeline that `driftmap export` wrote."""
    try:
        folder = found_folder(str(place))
    except ValueError:
        return False
    return (folder / NETWORK).is_file() and (folder / "model_index.json").is_file()


def settings_of_published(place: Path | str) -> dict[str, Any]:
    """Return the settings of a published network; ConfigError where it is none of ours."""
    settings = json.loads((found_folder(str(place)) / NETWORK).read_text())
    if settings.get("name") not in NETWORKS:
        raise ConfigError(
            f"{place}: {NETWORK} says the network {settings.get('name')!r}, expected one of "
            f"{', '.join(NETWORKS)}; it is no pipeline of `driftmap export`"
        )
    return settings


def model_of_published(place: Path | str) -> FlowMap:
    """Return the model of a published pipeline, frozen."""
    settings, folder = settings_of_published(place), found_folder(str(place))
    model = make_network(settings)
    assert isinstance(model, FlowMap)
    try:
        weights = read_weights(folder / NETWORKS[settings["name"]])
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if theirs := getattr(model.backbone, "stock_names", None):
        weights = {name: weights[other] for name, other in theirs.items() if other in weights}
    load_weights(model, {f"backbone.{name}": value for name, value in weights.items()}, source=folder)
    return model.eval().requires_grad_(False)


def check_published(place: Path | str, shards: ShardSet) -> None:
    """Raise ConfigError where a published pipeline has another autoencoder than that of the latents."""
    if "latents" not in shards.info or not is_published(place):
        return
    from diffusers import AutoencoderKL  # seconds of import that other teachers do not need

    folder = found_folder(str(place)) / "vae"
    found = fingerprint(AutoencoderKL.from_pretrained(folder)) if folder.is_dir() else "none"
    if found != shards.info["encoder"]:
        raise ConfigError(
            f"data.shards: {shards.folder} was encoded by the autoencoder {shards.info['encoder']}, but that "
            f"of {place} is {found}; encode the pictures again by the one that it was trained with"
        )
