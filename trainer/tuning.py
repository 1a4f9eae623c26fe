"""The weights of a diffusers checkpoint in a network of ours, and which of them train.

network.json of a run says its `source`. Where only some weights train, the others are the checkpoint's, which
is read again wherever the run is, and has to be the same: `weights` is their hash.
"""

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..models.pretrained import Pretrained
from .checkpoint import newest
from .config import ConfigError
from .pretrained_section import Lora

MOST_LISTED = 5
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of diffusers' networks


def opened(place: str, subfolder: str | None, *, key: str) -> Pretrained:
    """Return a checkpoint; a ConfigError about `key` where there is none."""
    try:
        return Pretrained.open(place, subfolder)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def tune(backbone: Any, source: dict[str, Any]) -> None:
    """Give a new network the checkpoint's weights, and let those train that `source` says.

    Raises ConfigError where the checkpoint is not the one that the run started from.
    """
    if next(backbone.parameters()).device.type != "meta":
        if "from_run" in source:
            place = source["from_run"]
            _fill_from_run(backbone, Path(place))
            now = fingerprint_of(_known(backbone))
        else:
            place = source["from_pretrained"]
            found = opened(place, source["subfolder"], key="model.from_pretrained")
            now = fingerprint_of(fill(backbone, found, source["variant"]))
        if now != source["weights"]:
            raise ConfigError(
                f"{place} holds the weights {now}, but the run started from {source['weights']}; bring them "
                "back: only what was trained is in the run"
            )
    let_train(backbone, source)


def tuned_from_run(
    backbone: Any, network: dict[str, Any], run: Path, tuned: dict[str, Any]
) -> dict[str, Any]:
    """Let those weights of a network train, which has the run's, that `tuned` says; return its `source`."""
    old = network.get("source", {})
    if "weights" in old:
        raise ConfigError(
            f"model.lora, model.train: of {run} some weights train already, and go on to; remove both"
        )
    source = {**old, "from_run": str(run), **tuned, "weights": fingerprint_of(_known(backbone))}
    let_train(backbone, source)
    return source


def _known(backbone: Any) -> dict[str, Tensor]:
    """Return the parameters of a network that it starts with."""
    new = {id(parameter) for parameter in _new(backbone)}
    return {name: p.detach() for name, p in backbone.named_parameters() if id(p) not in new}


@torch.no_grad()
def _fill_from_run(backbone: Any, run: Path) -> None:
    """Load the mean weights of a run; inputs that came later are as at birth."""
    checkpoint = newest(run) if run.is_dir() else None
    if checkpoint is None:
        raise ConfigError(f"model.from_run: {run} has no checkpoint, and what did not train is in it alone")
    saved = checkpoint.weights("ema")
    for name, parameter in backbone.named_parameters():
        if (old := saved.get(f"backbone.{name}")) is not None:
            parameter[tuple(map(slice, old.shape))] = old


def let_train(backbone: Any, source: dict[str, Any]) -> None:
    """Add adapters, or choose weights by name; what is new trains in either case."""
    own = {name: name for name, _ in backbone.named_parameters()}
    names, new = dict(getattr(backbone, "stock_names", own)), _new(backbone)
    backbone.requires_grad_(False)
    if source["lora"] is not None:
        _adapt(backbone, TypeAdapter(Lora).validate_python(source["lora"]))
    else:
        _train_some(backbone, names, source["train"])
    for parameter in new:
        parameter.requires_grad_(True)


def _train_some(backbone: nn.Module, names: dict[str, str], patterns: list[str]) -> None:
    for pattern in patterns:
        chosen = [own for own, theirs in names.items() if fnmatch(theirs, pattern)]
        if not chosen:
            near = sorted({theirs.rpartition(".")[0] for theirs in names.values()})
            raise ConfigError(
                f"model.train: no weight's name matches {pattern!r}; they are such as {', '.join(near[:3])}"
            )
        for own in chosen:
            backbone.get_parameter(own).requires_grad_(True)


def _adapt(backbone: Any, lora: Lora) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("model.lora: adapters need peft; pip install 'driftmap[lora]'") from error
    targets = lora.targets or getattr(backbone, "attention_layers", ATTENTION_LAYERS)
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(targets))  # pyright: ignore[reportArgumentType]
    try:
        inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets: {str(error).partition('.')[0]}; give ends of names of layers"
        ) from error


def _new(backbone: Any) -> list[nn.Parameter]:
    """Return the parameters that the checkpoint has not."""
    layers = getattr(backbone, "new_layers", [])
    return [parameter for layer in layers for parameter in layer.parameters()]


@torch.no_grad()
def fill(backbone: Any, found: Pretrained, variant: str | None) -> dict[str, Tensor]:
    """Load a checkpoint's weights and return them; ConfigError where they are not the network's."""
    try:
        weights = found.weights(variant)
    except ValueError as error:
        raise ConfigError(f"model.from_pretrained: {error}") from error
    new = {id(parameter) for parameter in _new(backbone)}
    wanted = {
        theirs: backbone.get_parameter(own)
        for own, theirs in backbone.stock_names.items()
        if id(backbone.get_parameter(own)) not in new
    }
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        raise ConfigError(
            f"model.from_pretrained: the weights of {found.network} are not those of its config.json: "
            f"{'; '.join(problems[:MOST_LISTED])}{more}. Copy both from one place"
        )
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])
    return weights


def fingerprint_of(weights: dict[str, Tensor]) -> str:
    """Return a hash of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def lora_weights(backbone: Any, lora: dict[str, Any]) -> dict[str, Tensor]:
    """Return adapters by diffusers' names, with factor 1: what B is multiplied by is in B."""
    factor = (lora["alpha"] or lora["rank"]) / lora["rank"]
    found = {}
    for name, value in backbone.state_dict().items():
        layer, _, rest = name.partition(".lora_")
        if rest:
            theirs = backbone.stock_names[f"{layer}.weight"].removesuffix(".weight")
            kind = rest[0]
            found[f"{theirs}.lora_{kind}.weight"] = value * (factor if kind == "B" else 1)
    return found


def merge_adapters(backbone: nn.Module) -> None:
    """Add adapters to the weights they are of, and take them away."""
    if not any(".lora_" in name for name, _ in backbone.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            above, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(above), last, module.get_base_layer())
