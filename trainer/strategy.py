"""How a task is spread over processes: Accelerate's process group, autocast, accumulation and clipping.

The learning rate is set by the loop before each step and never `prepare`d: Accelerate would step a schedule
once a process. The same goes for the loader and the checkpoint, which are ours.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from .recipe import TrainingSection

Result = TypeVar("Result")


class DataParallel:
    """Every process holds the whole model and gradients are averaged (DDP); one process trains alone.

    The processes are those of the launcher's environment (`WORLD_SIZE`), on GPUs, or on CPUs with gloo.
    """

    def __init__(self, section: TrainingSection, *, clip_norm: float | None) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = Accelerator(
            mixed_precision="bf16" if section.precision == "bf16" else "no",
            # Without a GPU Accelerate (1.15) needs to be told, or every process believes that it is alone.
            cpu=launched > 1 and not torch.cuda.is_available(),
            # A plugin, as the environment of `accelerate launch` overrides a plain number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(section.accumulation),
        )
        if self.world_size != launched:
            raise ValueError(
                f"{launched} processes were launched (WORLD_SIZE), but Accelerate sees {self.world_size}; "
                "launch with torchrun, or unset WORLD_SIZE to train in one process"
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

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; every process must call."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def first(self, function: Callable[[], Result]) -> Result:
        """Return to every process what `function` returns on the first one; every process must call.

        What it raises there is raised on every process: none is left waiting for one that has failed.
        """
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        torch.distributed.broadcast_object_list(answer, src=0, device=self.device)
        result, error = answer
        if error is not None:
            raise error
        return result
