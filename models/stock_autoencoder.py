"""Autoencoders of diffusers, by folder or id: AutoencoderKL, AutoencoderTiny, AutoencoderDC.

The last two give one latent a picture, a posterior without spread. Their weights are read as those of every
checkpoint are, from safetensors files alone.
"""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import nn

from .pretrained import found_folder, read_json, read_weights

CLASSES: dict[str, Any] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AutoencoderDC)}


def is_stock_autoencoder(place: Path | str) -> bool:
    """Return whether a place is an autoencoder of diffusers, or a pipeline that has one, and not a run."""
    return _part(str(place)) is not None


def load_stock_autoencoder(place: Path | str) -> Any:
    """Return the autoencoder of a folder or id, frozen; ValueError where it is of another class or broken."""
    folder = _part(str(place))
    if folder is None:
        raise ValueError(f"{place} has no autoencoder of diffusers; give a pipeline folder, or its vae")
    config = read_json(folder / "config.json")
    kind = config["_class_name"]
    if kind not in CLASSES:
        raise ValueError(f"{folder} holds a {kind}; expected one of {', '.join(CLASSES)}")
    model = CLASSES[kind].from_config(config)
    weights = read_weights(folder)
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights)) + sorted(
        name for name in set(own) & set(weights) if own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"the weights of {folder} are not those of its config.json: {wrong[0]} and {len(wrong) - 1} more "
            "are missing, unexpected or of another shape; copy both from one place"
        )
    model.load_state_dict(weights)
    return nn.Module.requires_grad_(model.eval(), False)


def _part(place: str) -> Path | None:
    try:
        folder = found_folder(place)
    except ValueError:
        return None
    for part in (folder / "vae", folder):
        file = part / "config.json"
        if file.is_file() and str(read_json(file).get("_class_name", "")).startswith("Autoencoder"):
            return part
    return None
