"""The processes of a run and what they tell each other.

What is told goes over CPUs (gloo), beside the gradients of GPUs (NCCL): to ask at every step costs no wait
for the GPU.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from .launcher import launcher
from .signals import LostProcess, StopFlag, Stopped

Result = TypeVar("Result")
WAITING = "waiting for the others"
_STOP = "driftmap: a process was asked to stop"


@dataclass(frozen=True)
class Stage:
    """What a process does, as the `number`-th thing since it began, and since when (monotonic)."""

    number: int
    name: str
    since: float


class World:
    """The processes of the launcher's environment (`WORLD_SIZE`), on GPUs, or on CPUs with gloo.

    `stop` says whether this one has been asked to stop: `with asked_to_stop() as world.stop`. `stage` says
    what it does: see heartbeat.py.

    Raises ValueError where Accelerate sees another number of processes than were launched.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes
        self.stop = StopFlag()
        self.stage = Stage(0, "starting", time.monotonic())
        if self.size != launcher().size:
            raise ValueError(
                f"{launcher().size} processes were launched (WORLD_SIZE), but Accelerate sees {self.size}; "
                "launch with torchrun, or unset WORLD_SIZE to train in one process"
            )

    def enter(self, stage: str) -> None:
        """Say what this process does from now on; all have to say the same things in the same order."""
        self.stage = Stage(self.stage.number + 1, stage, time.monotonic())

    @contextmanager
    def _waiting(self, stage: str = WAITING) -> Iterator[None]:
        self.enter(stage)
        yield
        self.enter("computing")

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any process; every process must ask."""
        if self.size == 1:
            return flag
        up = torch.tensor([flag], dtype=torch.int32)
        with self._waiting():
            dist.all_reduce(up, op=dist.ReduceOp.MAX)
        return bool(up.item())

    def stopping(self) -> bool:
        """Return whether any process has been asked to stop; every process must ask."""
        return self.any(bool(self.stop))

    def raise_if_stopped(self) -> None:
        """Raise Stopped where any process has been asked to stop, as far as this one has heard.

        None waits for another, so each may ask as often as it likes.
        """
        told = bool(self.stop)
        if self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            if told:
                store.set(_STOP, "asked")
            told = store.check([_STOP])
        if told:
            raise Stopped

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU; every process must call."""
        values = values.cpu()
        if self.size > 1:
            with self._waiting():
                dist.all_reduce(values)
        return values

    def gathered(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank; every process must call."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], Result]) -> Result:
        """Return to every process what `function` returns on the first one; every process must call.

        What it raises there is raised on every process: none is left waiting for one that has failed.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        with self._waiting("working while the others wait" if self.rank == 0 else WAITING):
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
        except (Exception, Stopped) as raised:
            error = raised
        try:
            found = self.gathered(error)
        except RuntimeError as broken:
            raise error or LostProcess(
                "another process has ended before its work was done; see what it printed, then run the same "
                "command again"
            ) from broken
        failed = [one for one in found if one is not None]
        # All go the same way: what has failed cannot be kept as what was stopped.
        worst = [one for one in failed if not isinstance(one, Stopped)] or failed
        if worst:
            raise error if error is not None and type(error) in map(type, worst) else worst[0]

    def described(self) -> str:
        """Return how many processes there are, where, and what started them; every process must call."""
        nodes = len(set(self.gathered(socket.gethostname())))
        backend = "NCCL" if self.device.type == "cuda" else "gloo"
        many = f"{self.size} processes on {nodes} node{'s' * (nodes > 1)}, {backend}"
        alone = f"one process on {self.device.type}"
        return f"{many if self.size > 1 else alone}, started by {launcher().name or 'no launcher'}"
