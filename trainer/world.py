"""The processes of a run and what they tell each other.

What is told goes over CPUs (gloo), beside the gradients of GPUs (NCCL): to ask at every step costs no wait
for the GPU.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

Result = TypeVar("Result")


class World:
    """The processes of the launcher's environment (`WORLD_SIZE`), on GPUs, or on CPUs with gloo.

    Raises ValueError where Accelerate sees another number of processes than were launched.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes
        if self.size != launched():
            raise ValueError(
                f"{launched()} processes were launched (WORLD_SIZE), but Accelerate sees {self.size}; "
                "launch with torchrun, or unset WORLD_SIZE to train in one process"
            )

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any process; every process must ask."""
        if self.size == 1:
            return flag
        up = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(up, op=dist.ReduceOp.MAX)
        return bool(up.item())

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU; every process must call."""
        values = values.cpu()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank; every process must call."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], Result]) -> Result:
        """Return to every process what `function` returns on the first one; every process must call.

        What it raises there is raised on every process: none is left waiting for one that has failed.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        result, error = answer
        if error is not None:
            raise error
        return result

    def together(self, function: Callable[[], object]) -> None:
        """Call `function` and wait for all processes; every process must call.

        What it raises on any process is raised on all of them, in its own words on the one that failed.
        """
        error = None
        try:
            function()
        except Exception as raised:
            error = raised
        try:
            found = self.gathered(error)
        except RuntimeError as broken:
            raise error or ChildProcessError(
                "another process has ended before its work was done; see what it printed, then run the same "
                "command again"
            ) from broken
        failed = [one for one in found if one is not None]
        if failed:
            raise error or failed[0]


def launched() -> int:
    """Return the number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
