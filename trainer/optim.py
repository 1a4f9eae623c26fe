"""The optimizer of a recipe, and its learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from .fake import players
from .fragment import MOMENTS
from .recipe import OptimizerSection


def learning_rate(section: OptimizerSection, step: int, *, num_steps: int) -> float:
    """Return the learning rate of `step` in 0 .. num_steps - 1; decays reach 0 where the last step ends."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    if section.decay == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if section.decay == "linear":
        return section.lr * max(0.0, 1 - done)
    return section.lr


def adamw(section: OptimizerSection, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; matrices decay, vectors (biases, norms) do not.

    `factor` of a group multiplies the learning rate.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = (1.0, (section.fake_lr or section.lr) / section.lr)
    groups = [
        {"params": params, "weight_decay": decay, "factor": factor}
        for parameters, factor in zip(players(trained), factors, strict=False)
        for params, decay in (
            ([p for p in parameters if p.dim() >= 2], section.weight_decay),
            ([p for p in parameters if p.dim() < 2], 0.0),
        )
    ]
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the moments that AdamW would make at its first step, so that a checkpoint can fill them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
