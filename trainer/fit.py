"""Whether samples fit a network, and a teacher its student: shapes, classes, captions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from ..data.decode import Batch, find_decoder
from ..data.labels import CAPTION, CLASS
from ..data.reader import Reader, Sample
from ..data.resampled import first_batch
from ..data.samples import Samples
from ..data.shards import ShardSet
from ..data.stream import ShardStream
from ..models.flow_map import FlowMap
from .config import ConfigError
from .meaning import in_one_line, path_of
from .objective import Objective


def check_data(
    model: nn.Module, network: dict[str, Any], shards: ShardSet, *, name: str = "the model"
) -> None:
    """Raise ConfigError where samples, classes or captions do not fit a network; messages call it `name`."""
    first = first_batch(shards, 1)
    _check_shapes(model, network, shards, name)
    text_width = model.text_width if isinstance(model, FlowMap) else 0
    if (text_width > 0) != ("text" in first):
        found = f"has text_width {text_width}" if text_width else "takes no captions"
        raise ConfigError(
            f"data.label: {shards.label!r}, but {name} {found}; a model of captions needs {CAPTION!r}, "
            "and no other does"
        )
    if num_classes := network.get("num_classes", 0):
        _check_classes(num_classes, shards, name)
    elif text_width:
        _check_captions(network, shards, name)
    elif shards.label != CLASS:
        raise ConfigError(
            f"data.label: {shards.label!r} has no effect: {name} has no classes; remove it, or set "
            "num_classes"
        )


def _check_shapes(model: nn.Module, network: dict[str, Any], shards: ShardSet, name: str) -> None:
    channels = network.get("in_channels", network.get("channels"))
    for batch, sample in _examples(shards):
        shape = tuple(batch["mean" if "mean" in batch else "data"].shape[1:])
        if hasattr(model, "sample_shape"):
            fits, expected = shape == model.sample_shape, model.sample_shape
        else:
            fits, expected = (
                channels is None or (len(shape), shape[0]) == (3, channels),
                f"({channels}, H, W)",
            )
        if not fits:
            sizes = len(shards.buckets) if not isinstance(shards, ShardStream) else 1
            several = f" (one of {sizes} sizes, and this network takes one)" if sizes > 1 else ""
            raise ConfigError(
                f"{name} takes samples of shape {expected}, but {sample.name} in {shards.folder} has shape "
                f"{shape}{several}; change the model section to fit, or give other data.shards"
            )


def _examples(shards: ShardSet) -> Iterator[tuple[Batch, Sample]]:
    """Yield a sample of each data set and of each size of pictures, with its name."""
    if isinstance(shards, ShardStream):
        yield first_batch(shards, 1), shards.head[0]
        return
    sets = [shards.starts[shard] for shard in np.cumsum((0, *shards.joined[:-1]))]
    samples, names = Samples(shards, find_decoder(shards)), Reader(shards, extensions=())
    for number in sorted({*sets, *(stretch.start for stretch in shards.stretches if stretch)}):
        yield samples.batch(np.array([number]), index=np.array([number])), names.read(number)


def _check_classes(num_classes: int, shards: ShardSet, name: str) -> None:
    labels = shards.label_numbers
    if not labels:
        raise ConfigError(
            f"{name} has num_classes {num_classes}, but {shards.folder} holds no class labels (.cls); "
            "set it to 0, or give data.shards with labels"
        )
    outside = [label for label in labels if not 0 <= label < num_classes]
    if outside:
        raise ConfigError(
            f"{name} has num_classes {num_classes}, but {shards.folder} holds the class {outside[-1]}; "
            f"classes are counted from 0, so set it to {max(labels) + 1} or more"
        )


def _check_captions(network: dict[str, Any], shards: ShardSet, name: str) -> None:
    text = shards.info["text"]
    for setting, found, fits in (
        ("text_width", text["width"], network["text_width"] == text["width"]),
        ("max_tokens", text["max_tokens"], network["max_tokens"] >= text["max_tokens"]),
    ):
        if not fits:
            raise ConfigError(
                f"{name} has {setting} {network[setting]}, but the captions in {shards.folder} have {found}; "
                f"set model.{setting} to {found}, or encode them again"
            )


def check_teacher(teacher: FlowMap, taught: dict[str, Any], shards: ShardSet) -> None:
    """Raise ConfigError where the classes of a teacher, with the recipe `taught`, are not its student's."""
    label = taught["data"].get("label", CLASS)
    if isinstance(teacher.null_condition, int) and label != shards.label:
        raise ConfigError(
            f"data.label: {shards.label!r}, but the classes of the teacher are {label!r}; set it to that, or "
            "give another teacher.run"
        )


def check_trajectories(
    objective: Objective, model: nn.Module, shards: ShardSet, *, place: str = "data.shards"
) -> None:
    """Raise ConfigError where an objective of trajectories is given other samples, or another path's."""
    if not getattr(objective, "uses_trajectories", False):
        return
    made = shards.info.get("trajectories")
    if made is None:
        raise ConfigError(
            f"{place}: {shards.folder} holds no trajectories of a teacher, of which the objective learns; "
            "make them with `driftmap trajectories RUN OUT`, and give OUT"
        )
    if isinstance(model, FlowMap) and model.path != path_of(made["path"]):
        raise ConfigError(
            f"objective.path: the trajectories in {shards.folder} do not go along it; set it to "
            f"{in_one_line(made['path'])}, or give {place} of a teacher that goes along it"
        )
