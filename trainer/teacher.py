"""The velocity that teaches: that of a frozen run, guided, and seen along the student's path."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..data.shards import ShardSet
from ..models.denoiser import Along, InBf16, InProcess
from ..models.flow_map import FlowMap, Process, Velocity
from .build import load_model, run_recipe, settings_of_run
from .checkpoint import fingerprint
from .config import ConfigError
from .fit import check_data, check_teacher
from .guiding import guided
from .meaning import in_one_line
from .published import check_published
from .recipe import Recipe, TeacherSection


def teacher_of(
    recipe: Recipe,
    student: nn.Module,
    shards: ShardSet,
    device: torch.device,
    *,
    shard: Callable[[nn.Module], None] | None,
) -> tuple[Velocity | None, str | None]:
    """Return the velocity that teaches, None without a teacher, and the fingerprint of its weights.

    Raises ConfigError where the runs of the section do not fit the student, its data, or each other.
    """
    if recipe.teacher is None:
        return None, None
    velocity, model, weights = velocity_of(recipe.teacher, shards, device, shard=shard)
    if isinstance(student, FlowMap) and student.path != model.path:
        if isinstance(model, Process):
            raise ConfigError(
                f"objective.path: the teacher {recipe.teacher.run} has a process of its own, and no state of "
                "it is seen along another path; set objective.path to "
                f"{in_one_line(asdict(model.path))}"
            )
        velocity = Along(velocity, model.path, student.path)
    if isinstance(model, Process) and not isinstance(velocity, Process):
        velocity = InProcess(velocity, model)
    return velocity, weights


def velocity_of(
    section: TeacherSection,
    shards: ShardSet,
    device: torch.device,
    *,
    shard: Callable[[nn.Module], None] | None = None,
) -> tuple[Velocity, FlowMap, str]:
    """Return the guided velocity of a frozen run, its network, and the fingerprint of the weights.

    Raises ConfigError where the runs of the section do not fit the data, or each other.
    """
    model = _network(section.run, "run", weights=section.weights, shards=shards).to(device)
    networks = [model]
    if section.weak is not None:
        networks += [_network(section.weak, "weak", weights=section.weights, shards=shards).to(device)]
    weights = "+".join(fingerprint(network) for network in networks)
    for network in networks:
        if section.precision == "bf16":
            network.backbone.bfloat16()
        if section.shard and shard is not None:
            shard(network.backbone)
    try:
        velocity = guided(
            model,
            section.scale,
            interval=section.guidance_interval,
            rescale=section.guidance_rescale,
            weak=networks[1] if len(networks) > 1 else None,
        )
    except ConfigError as error:
        raise ConfigError(f"teacher: {error}") from error
    if section.precision == "bf16":
        velocity = InBf16(velocity)
    return velocity, model, weights


def _network(run: Path, key: str, *, weights: str, shards: ShardSet) -> FlowMap:
    """Return the network of a run, which teaches; `key` is its place in the section."""
    model = load_model(run, weights=weights)
    if not isinstance(model, FlowMap):
        raise ConfigError(f"teacher.{key}: {run} holds no flow map; give a run of a generative objective")
    check_data(model, settings_of_run(run), shards, name=f"the teacher {run}")
    check_teacher(model, run_recipe(run), shards)
    check_published(run, shards)
    return model
