"""What does not go together, and what to do instead: objective, strategy, attention, compile, recomputing.

Every line was found by running it (torch 2.13, DeepSpeed 0.19.8, two CPU processes) unless it says otherwise.
What is not refused here is in the matrix of tests/test_strategies.py.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..models.flow_map import FlowMap
from ..models.layers import Stage, innermost_stages
from .blocks import attentions, blocks
from .config import ConfigError
from .recipe import Fsdp, Recipe, Zero, objective_name

INSTEAD = (
    "use strategy fsdp or zero2, or an objective without that derivative: derivative: finite_difference, "
    "gradient: semigradient, or the rules semigroup and discrete_eulerian"
)


def check_compatibility(recipe: Recipe, model: nn.Module) -> None:
    """Raise ConfigError with a line for every combination of settings that does not work."""
    problems = [
        *_of_derivatives(recipe, model),
        *_of_second_derivatives(recipe),
        *_of_differences(recipe, model),
        *_of_strategies(recipe),
        *_of_guidance(recipe, model),
        *_without_effect(recipe, model),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _of_derivatives(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """Yield what forward-mode differentiation cannot go through."""
    tangent, training = recipe.objective.tangent, recipe.training
    name = f"objective {objective_name(recipe.objective)!r} (derivative: {tangent})"
    if not tangent.startswith("forward"):
        return
    staged = all(isinstance(block, Stage) for block in blocks(model))
    inside = {id(p) for stage in innermost_stages(model) for p in stage.parameters()}
    wholly = all(id(p) in inside for p in model.parameters())
    if recipe.strategy.name == "zero3" and tangent == "forward_with_gradient":
        yield (
            f"strategy.name: {name} differentiates a derivative, and zero3 has let go of the parameters "
            f"by then; {INSTEAD}"
        )
    elif not (wholly if recipe.strategy.name == "zero3" else staged or recipe.strategy.name != "fsdp"):
        yield (
            f"strategy.name: {recipe.strategy.name} calls hooks that have no forward-mode rule, which {name} "
            f"needs; this network is not built of stages (models/layers.py) all through; {INSTEAD}"
        )
    if training.recompute_every and not staged:
        yield (
            f"training.recompute_every: {name} is lost where a block is made again; this network is not "
            "built of stages (layers.py); remove it"
        )
    if training.compile and tangent == "forward_with_gradient":
        yield f"training.compile: inductor cannot compile the gradient of {name}; set it to false"
    if training.attention == "xformers":
        yield (
            f"training.attention: xformers has no forward-mode rule, which {name} needs; use sdpa, math or "
            "jvp_flash"
        )


def _of_second_derivatives(recipe: Recipe) -> Iterator[str]:
    """Yield what a divergence that is trained cannot go through."""
    if not getattr(recipe.objective, "differentiates_twice", False):
        return
    name = f"objective {objective_name(recipe.objective)!r} (a trained divergence)"
    if recipe.strategy.name in ("fsdp", "zero3"):
        yield (
            f"strategy.name: {recipe.strategy.name} has let go of the parameters where {name} is "
            "differentiated again; use ddp or zero2"
        )
    if recipe.training.compile:
        yield f"training.compile: inductor cannot compile the gradient of {name}; set it to false"
    if recipe.training.attention in ("xformers", "jvp_flash"):
        yield f"training.attention: only math has the second derivative that {name} needs; use sdpa or math"


def _of_differences(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """Yield what the steps of tangent.py are too long for."""
    objective: Any = recipe.objective
    along_s = objective_name(objective) == "eulerian" and objective.derivative == "finite_difference"
    if along_s and any(getattr(module, "max_radians", 100) > 100 for module in model.modules()):
        yield (
            "objective.derivative: this network sees waves of 1000 radians in the time that objective "
            "'eulerian' moves, and a finite difference has a step for 100 (its error was 101 %); use forward"
        )


def _of_strategies(recipe: Recipe) -> Iterator[str]:
    """Yield what a strategy cannot do."""
    strategy, training = recipe.strategy, recipe.training
    if isinstance(strategy, Zero) and training.precision == "fp16":
        yield f"training.precision: {strategy.name} would train without loss scaling in fp16; use bf16"
    if isinstance(strategy, Zero) and getattr(recipe.objective, "fake_network", False):
        yield (
            f"objective.fake_network: {strategy.name} has one optimizer, which moves all weights in every "
            "step; use strategy ddp or fsdp, or set it to false"
        )
    if strategy.name == "zero3" and recipe.ema.target is not None:
        yield (
            "ema.target: under zero3 no process has the parameters that a target network is copied from; use "
            "strategy fsdp, which shards it, or zero2, or remove it"
        )
    if not isinstance(strategy, Zero | Fsdp):
        return
    if training.channels_last:
        yield f"training.channels_last: {strategy.name} lays parameters out flat; set it to false, or use ddp"


def _of_guidance(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """Yield where the scales that are drawn and the input for them are not both there."""
    takes = isinstance(model, FlowMap) and model.takes_guidance
    drawn = recipe.teacher is not None and recipe.teacher.drawn is not None
    if drawn and not takes:
        yield (
            "teacher.guidance: a scale that is drawn for each sample has to be told to the network; set "
            "model.guidance_input to true (networks dit and unet), or give one scale"
        )
    if takes and not drawn:
        yield (
            "model.guidance_input: the network takes a scale of guidance, and none is drawn; set "
            "teacher.guidance to a range, such as {uniform: [1, 4]}"
        )


def _without_effect(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """Yield settings that this network has nothing for."""
    training = recipe.training
    if training.attention != "sdpa" and not attentions(model):
        yield "training.attention: this network has no attention whose form can be chosen; remove it"
    if (training.recompute_every or training.compile) and not blocks(model):
        yield (
            "training.recompute_every, training.compile: this network has no list of repeated blocks; "
            "remove them"
        )
