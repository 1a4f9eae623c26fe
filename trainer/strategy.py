"""How a task is spread over processes: what is asked for, and the plainest answer, data parallelism.

A strategy wraps the task, averages gradients, steps the optimizer, and shows what this process holds as
fragments. The learning rate is set before each step and never `prepare`d: Accelerate would step a schedule
once a process. The same goes for the loader and the checkpoint, which are ours.

    ddp    here                every process holds everything
    fsdp   fully_sharded.py    torch's FSDP2: parameters, gradients and moments are sharded
    zero*  zero.py             DeepSpeed: moments (1), gradients (2) and parameters (3) are sharded
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .fake import players
from .fragment import Fragment
from .launcher import launcher
from .optim import adamw, start_moments
from .recipe import OptimizerSection, Recipe
from .world import World

FP16_SCALE = 2.0**16
FP16_GROWTH_STEPS = 2000


def process_group(timeout: timedelta | None = None) -> Accelerator:
    """Return Accelerate's process group, NCCL between GPUs, gloo between CPUs; `timeout` ends a wait."""
    size = launcher().size
    if torch.cuda.is_available():
        settings = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", timeout=timeout)
        return Accelerator(kwargs_handlers=[settings])
    # Without a GPU Accelerate (1.15) needs to be told, or every process believes that it is alone.
    return Accelerator(cpu=size > 1, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])


class DataParallel:
    """Every process holds the whole model and gradients are averaged (DDP); one process trains alone."""

    world: World
    task: nn.Module  # call only this one: what it wraps does not average gradients
    optimizer: torch.optim.Optimizer
    fragments: list[Fragment]
    players: Sequence[list[nn.Parameter]] = ()  # who is clipped and counted alone, see fake.py

    def __init__(self, recipe: Recipe) -> None:
        self.accumulation = recipe.training.accumulation
        hung_after_s = recipe.training.hung_after_s
        # Longer than what finds out who hangs: the end of a wait in a collective does not tell.
        self.longest_wait = None if hung_after_s is None else timedelta(seconds=max(1800, 2 * hung_after_s))
        self.clip_norm = recipe.optimizer.clip_norm
        self.scale = FP16_SCALE if recipe.training.precision == "fp16" else 1.0
        self.grad_norm: float | None = None  # of the last step, before clipping
        self.stepped = False  # whether the last micro step completed a step
        self.applied = False  # whether that step changed the weights: its gradient was finite
        self.overflowed = False  # whether it was not finite while fp16 losses were scaled up
        self.bad_gradients: dict[str, Tensor] = {}  # of the last step that was not finite, by name
        self._micro_steps = 0
        self._good_steps = 0
        self._connect()

    def _connect(self) -> None:
        self.world = World(process_group(self.longest_wait))

    def prepare(self, task: nn.Module, model: nn.Module, section: OptimizerSection) -> None:
        """Wrap the task, make the optimizer and check that what was asked for is in force."""
        self.task = self._wrapped(task.to(self.world.device), model)
        self.parameters = trainable(model)
        self.players = players(self.parameters)
        self.optimizer = adamw(section, model)
        start_moments(self.optimizer)
        self.fragments = self._fragments(model)
        self._check(model)

    def _wrapped(self, task: nn.Module, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return task
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # Gradients are views of the buckets they travel in, not copies.
        # In a step of a fake network alone the student has no gradient.
        some = getattr(model, "fake", None) is not None
        return DistributedDataParallel(
            task, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=some
        )

    def shard_frozen(self, module: nn.Module) -> None:
        """Shard a network that is not trained, such as a teacher; only some strategies can."""
        raise NotImplementedError("only fsdp shards a frozen network")

    def _fragments(self, model: nn.Module) -> list[Fragment]:
        return [
            Fragment(
                name=name,
                shape=tuple(parameter.shape),
                start=0,
                value=parameter.detach(),
                exp_avg=self.optimizer.state[parameter]["exp_avg"],
                exp_avg_sq=self.optimizer.state[parameter]["exp_avg_sq"],
                writes=number % self.world.size == self.world.rank,
            )
            for number, (name, parameter) in enumerate(trainable(model).items())
        ]

    def _check(self, model: nn.Module) -> None:
        if self.world.size > 1 and not isinstance(self.task, DistributedDataParallel):
            raise RuntimeError(f"asked for ddp, but the task is a {type(self.task).__name__}")

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return the context of one micro step; gradients are averaged over processes in the last one."""
        self._micro_steps += 1
        self.stepped = self._micro_steps % self.accumulation == 0
        return self._synchronised(self.stepped)

    def _synchronised(self, now: bool) -> AbstractContextManager[Any]:
        return nullcontext() if now or self.world.size == 1 else self.task.no_sync()  # pyright: ignore[reportCallIssue]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro step's loss, divided by the number of micro steps."""
        self.world.enter("averaging gradients" if self.stepped else "computing gradients")
        (loss * (self.scale / self.accumulation)).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Clip, step and clear the gradients where accumulation is complete.

        A gradient that is not finite changes nothing (`applied` is False): it is so on every process, as the
        norm is that of the averaged gradient.
        """
        if not self.stepped:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        moving = [[p for p in player if p.grad is not None] for player in self.players]
        norms = [self._norm([p.grad for p in player if p.grad is not None]) for player in moving if player]
        self.applied = all(bool(torch.isfinite(norm)) for norm in norms)
        self.overflowed = not self.applied and self.scale > 1
        if self.applied:
            self.grad_norm = math.hypot(*(norm.item() for norm in norms))
            if self.clip_norm is not None:
                for player, norm in zip(filter(None, moving), norms, strict=True):
                    nn.utils.clip_grads_with_norm_(player, self.clip_norm, norm)
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        else:
            grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            self.bad_gradients = {name: self.local(grad) for name, grad in grads.items()}
        self.optimizer.zero_grad(set_to_none=True)
        self._rescale()

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a tensor that is laid out like a parameter."""
        return tensor

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def _rescale(self) -> None:
        """Halve the scale of fp16 losses where gradients overflowed, double it after many good steps."""
        if self.scale == 1:
            return
        self._good_steps = self._good_steps + 1 if self.applied else 0
        if not self.applied:
            self.scale = max(1.0, self.scale / 2)
        elif self._good_steps % FP16_GROWTH_STEPS == 0:
            self.scale *= 2

    @property
    def num_updates(self) -> int:
        """The number of optimizer steps that changed the weights, as the optimizer counts them."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(number)

    @property
    def fake_updates(self) -> int | None:
        """The number of updates of the fake network, None where there is none: the student has had fewer."""
        found = [self.optimizer.state[player[0]]["step"] for player in self.players[1:]]
        return int(found[0].item()) if found else None

    @fake_updates.setter
    def fake_updates(self, number: int) -> None:
        for parameter in self.players[1]:
            self.optimizer.state[parameter]["step"].fill_(number)

    def refresh(self) -> None:
        """Let the model hold what the fragments hold, after they were written from outside."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)


def strategy_of(recipe: Recipe) -> DataParallel:
    """Return the strategy that a recipe asks for."""
    from .fully_sharded import FullySharded
    from .zero import Zero

    kinds: dict[str, Callable[[Recipe], DataParallel]] = {"ddp": DataParallel, "fsdp": FullySharded}
    return kinds.get(recipe.strategy.name, Zero)(recipe)
