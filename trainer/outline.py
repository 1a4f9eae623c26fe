"""The outline of a network that a config names: its settings, and its shapes without values."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .build import make_network, settings_of_run


def network_of(model: dict[str, Any]) -> nn.Module:
    """Return the network of a `model` section on the meta device; what does not train is marked so."""
    some = {name: model[name] for name in ("lora", "train") if model.get(name)}
    settings = network_settings(model)
    if some:
        settings = settings | {"source": {"lora": None, "train": [], "weights": ""} | some}
    with torch.device("meta"):
        return make_network(settings)


def network_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a network, those of its run or checkpoint where it starts from one."""
    if "from_pretrained" in model:
        added = dict.fromkeys(("two_times", "guidance_input"), True) if model["guidance_input"] else {}
        return settings_of_run(Path(model["from_pretrained"])) | added
    added = {key: value for key, value in model.items() if key not in ("from_run", "lora", "train")}
    return settings_of_run(Path(model["from_run"])) | added if "from_run" in model else model
