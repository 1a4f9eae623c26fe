"""What a run's network predicts, and along which path: said once by its objective, kept with the network.

network.json holds `means: {prediction, path, data_std, variance}` beside the network's own settings.
`mean_velocity` is a flow map's own prediction; every other one makes a `Denoiser`. A distillation that starts
from a denoiser keeps what its network predicts: the student is a flow map all the same.

An objective of another kind of model has a method `meaning()` that returns `{kind, ...}`, and MODELS has the
class of the kind. Its `of(network, means)` makes a model of a backbone. It may have
- `refusal(means, old)`: why it cannot start from a network that meant `old`, or None; without it, it starts
  from its like alone;
- `start_from(model)`, by which it takes the weights of a model of another kind.
"""

from typing import Any

import yaml
from pydantic import TypeAdapter

from ..models.continuous_flow import ContinuousFlow
from ..models.denoiser import Denoiser
from ..models.diffflow import DiffFlow
from ..models.flow_map import FlowMap
from ..models.neural_flow import LearnedFlow
from ..models.path import Path
from .config import ConfigError
from .objective import Objective, Paths

PLAIN = "mean_velocity"
MODELS: dict[str, Any] = {
    "continuous_flow": ContinuousFlow,
    "diffflow": DiffFlow,
    "neural_flow": LearnedFlow,
}


def meaning_of(objective: Objective) -> dict[str, Any] | None:
    """Return what an objective trains a network to predict; None where it trains no flow."""
    meaning = getattr(objective, "meaning", None)
    if meaning is not None:
        return meaning()
    path = getattr(objective, "path", None)
    if path is None:
        return None
    return {
        "prediction": getattr(objective, "prediction", PLAIN),
        "path": TypeAdapter(Paths).dump_python(path, mode="json"),
        "data_std": getattr(objective, "data_std", 1.0),
        "variance": getattr(objective, "variance", "fixed"),
    }


def path_of(settings: dict[str, Any]) -> Path:
    """Return the path of the settings that network.json holds."""
    return TypeAdapter(Paths).validate_python(settings)


def flow_of(network: Any, means: dict[str, Any] | None) -> FlowMap:
    """Return a backbone as the model that its meaning makes of it."""
    if means is None:
        return FlowMap(network)
    if "kind" in means:
        try:
            return MODELS[means["kind"]].of(network, means)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    path, channels = path_of(means["path"]), network.sample_shape[0]
    wanted = 2 * channels if means.get("variance") == "learned" else channels
    if getattr(network, "out_channels", channels) != wanted:
        raise ConfigError(
            f"model.out_channels: {network.out_channels}, but samples of {channels} channels and objective."
            f"variance {means.get('variance', 'fixed')} take {wanted}; set it to {wanted}"
        )
    if means["prediction"] == PLAIN:
        return FlowMap(network, path)
    return Denoiser(network, path, prediction=means["prediction"], data_std=means["data_std"])


def meaning_after(
    old: dict[str, Any] | None, objective: Objective, *, source: object
) -> dict[str, Any] | None:
    """Return what a network from the run `source`, which meant `old`, means under another objective.

    Raises ConfigError where the objective would take its output for something else.
    """
    new = meaning_of(objective)
    if new is None:
        return None
    old_kind, new_kind = kind_of(old), kind_of(new)
    if new_kind is not None:
        refusal = getattr(MODELS[new_kind], "refusal", _unlike)(new, old or {})
        if refusal is not None:
            raise ConfigError(f"model.from_run: {source}: {refusal}")
        return new
    if old_kind is not None:
        raise ConfigError(
            f"model.from_run: the network of {source} is part of a {old_kind} and says something else; give "
            f"the model a network of its own, and set teacher.run to {source}"
        )
    unsaid = {"prediction": PLAIN, "path": None, "data_std": 1.0, "variance": "fixed"}
    old = unsaid | (old or {})
    if new["prediction"] == PLAIN != old["prediction"]:
        if new["path"] != old["path"]:
            raise ConfigError(
                f"objective.path: the network of {source} predicts {old['prediction']} along another path, "
                "and a student that starts from it goes the same way; set objective.path to "
                f"{in_one_line(old['path'])}, "
                "or give the model a network of its own"
            )
        return old
    was = {**old, "prediction": "velocity"} if old["prediction"] == PLAIN != new["prediction"] else old
    for key in ("prediction", "data_std", "variance"):
        if new[key] != was[key]:
            raise ConfigError(
                f"objective.{key}: the network of {source} was trained for {key} {was[key]}, not {new[key]}; "
                f"set it to {was[key]}, or give the model a network of its own"
            )
    return new


def kind_of(means: dict[str, Any] | None) -> str | None:
    """Return the kind of a meaning; None for a flow map and a denoiser."""
    return (means or {}).get("kind")


def _unlike(means: dict[str, Any], old: dict[str, Any]) -> str | None:
    """Return in what a meaning differs from an older one, if it does."""
    keys = [key for key in {**means, **old} if means.get(key) != old.get(key)]
    if not keys:
        return None
    said = ", ".join(f"{key} is {old.get(key)!r} there and {means.get(key)!r} here" for key in keys)
    return f"its network was trained for something else: {said}; set them alike, or take no from_run"


def in_one_line(path: dict[str, Any]) -> str:
    """Return a path's settings as YAML on one line."""
    ordered = {"name": path["name"], **path}
    return yaml.safe_dump(ordered, default_flow_style=True, sort_keys=False, width=1000).strip()
