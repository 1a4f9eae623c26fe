"""A network of its settings, and what it starts with where it takes more inputs than the run before it."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, buffers_in, frozen_of, load_weights, newest
from .config import ConfigError, plugin_class, split_name
from .fake import FAKE
from .meaning import flow_of
from .recipe import NETWORKS, network_kind
from .tuning import tune


def make_network(settings: dict[str, Any]) -> nn.Module:
    """Return the model of a network's settings, newly initialised: a flow map, or another kind as it is."""
    name, arguments = split_name(settings, place="model")
    means, source = arguments.pop("means", None), arguments.pop("source", None)
    network = plugin_class(NETWORKS, name, place="model")
    made: Any = network(**arguments)
    if source is not None and "weights" in source:
        tune(made, source)
    return flow_of(made, means) if network_kind(network) == "flow_map" else made


def with_inputs(network: dict[str, Any], added: dict[str, Any], *, source: Path) -> dict[str, Any]:
    """Return the settings of a run's network with inputs added; ConfigError where it cannot take them."""
    name, _ = split_name(network, place="model")
    takes = inspect.signature(plugin_class(NETWORKS, name, place="model").__init__).parameters
    for key in added:
        if key not in takes:
            raise ConfigError(f"model.{key}: the network {name!r} of {source} has no such input; remove it")
    return {**network, **added}


def loaded(model: nn.Module, folder: Path, *, weights: str = "ema", grow: bool = False) -> nn.Module:
    """Return a model with the weights of a run, all but those that only its loss was made with.

    It may `grow`: have inputs that the run's has not.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; train it first")
    saved = checkpoint.weights(weights).items()
    kept = {name: value for name, value in saved if not name.startswith(("log_variance.", FAKE))}
    # Not in a checkpoint of means: buffers. Not in any: what did not train, and is there already.
    kept = buffers_in(checkpoint, model) | kept | frozen_of(model)
    load_weights(model, grown(kept, model) if grow else kept, source=checkpoint.folder)
    return model


@torch.no_grad()
def grown(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network without some inputs for a model with them, what is new as at birth.

    A matrix that has become wider has the old columns first.
    """
    whole = {name: born.detach().clone() for name, born in model.named_parameters()}
    for name, old in weights.items():
        if name in whole:
            whole[name][tuple(map(slice, old.shape))] = old
    return weights | whole
