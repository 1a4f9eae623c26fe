"""How a task is spread over processes: Accelerate's process group, autocast, accumulation and clipping.

The learning rate is set by the loop before each step and never `prepare`d: Accelerate would step a schedule
once a process. The same goes for the loader and the checkpoint, which are ours.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .recipe import TrainingSection


class DataParallel:
    """Every process holds the whole model and gradients are averaged (DDP); one process trains alone."""

    def __init__(self, section: TrainingSection, *, clip_norm: float | None) -> None:
        self.accelerator = Accelerator(
            mixed_precision="bf16" if section.precision == "bf16" else "no",
            gradient_accumulation_steps=section.accumulation,
        )
        self.clip_norm = clip_norm if clip_norm is not None else float("inf")
        self.grad_norm: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.accelerator.num_processes

    @property
    def stepped(self) -> bool:
        """Whether the last backward completed an optimizer step."""
        return self.accelerator.sync_gradients

    def prepare(self, task: nn.Module) -> nn.Module:
        """Return the task on its device, wrapped to average gradients; call only what is returned."""
        return self.accelerator.prepare_model(task)

    def accumulate(self, task: nn.Module) -> AbstractContextManager[Any]:
        """Return the context of one micro step."""
        return self.accelerator.accumulate(task)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro step's loss, divided by the number of micro steps."""
        self.accelerator.backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Clip, step and clear the gradients where accumulation is complete; keep the norm in `grad_norm`."""
        if not self.stepped:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any process; every process must ask."""
        if self.world_size == 1:
            return flag
        up = torch.tensor([flag], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(up, op=torch.distributed.ReduceOp.MAX)
        return bool(up.item())
