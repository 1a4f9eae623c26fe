"""The repeated blocks of a network, and what is done to each: attention's form, recomputing, compiling.

In this order, and all of it before a strategy shards the blocks.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.layers import Attention
from .recipe import TrainingSection


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: the outermost members of its module lists."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def set_up_blocks(model: nn.Module, section: TrainingSection) -> None:
    """Give a network's blocks the form that a config asks for."""
    set_attention(model, section.attention)
    if section.recompute_every is not None:
        for block in blocks(model)[:: section.recompute_every]:
            # Randomness is keyed, so no generator's state has to be put back.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if section.compile:
        for block in blocks(model):
            block.compile()


def set_attention(model: nn.Module, how: Attention) -> None:
    """Set the form of every attention of a network."""
    for module in attentions(model):
        setattr(module, "how", how)  # noqa: B010 - pyright takes an attribute of a module for a tensor


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attentions of a network whose form can be chosen."""
    return [module for module in model.modules() if hasattr(module, "how")]
