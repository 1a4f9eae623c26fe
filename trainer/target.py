"""The target network: a frozen copy of the network that holds a fast mean of its weights (`ema.target`).

A rule that learns from its own network, from its velocity or its shorter jumps, asks this one instead, which
changes more slowly. Its weights are the mean `ema-target`: sharded, checkpointed and restored as every mean
is, so that a run goes on exactly. With decay 0 they are the current weights.

Source: Zhou et al., "Terminal velocity matching", 2025; Song et al., "Consistency models", 2023, section 4.
"""

import copy
from dataclasses import replace

import torch

from ..models.flow_map import FlowMap
from .blocks import set_up_blocks
from .ema import TARGET
from .loop import Run
from .recipe import Recipe
from .strategy import DataParallel


def target_of(recipe: Recipe, model: torch.nn.Module, strategy: DataParallel) -> FlowMap | None:
    """Return a frozen copy of a model, before anything is done to that, if a recipe asks for one."""
    if recipe.ema.target is None:
        return None
    target = copy.deepcopy(model).eval().requires_grad_(False).to(strategy.world.device)
    assert isinstance(target, FlowMap)
    target.log_variance = None  # it weighs errors, and no rule learns from it
    set_up_blocks(target, replace(recipe.training, recompute_every=None))
    if recipe.strategy.name == "fsdp":
        strategy.shard_frozen(target.backbone)
    return target


@torch.no_grad()
def follow(run: Run) -> None:
    """Let the target network, if there is one, hold its mean, after this or the weights have changed.

    The mean is lent to the model for that, so that the strategy gathers it as it gathers weights.
    """
    if run.target is None:
        return
    assert isinstance(run.model, FlowMap)
    backbone, local = run.model.backbone, run.strategy.local
    with run.ema.swapped_in(TARGET, refresh=run.strategy.refresh):
        for own, live in zip(run.target.backbone.parameters(), backbone.parameters(), strict=True):
            local(own).copy_(local(live))
