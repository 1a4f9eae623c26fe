"""The training loop, and the task that it trains: `Task(model, objective)`, whose forward is the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.shards import ShardSet
from ..models.flow_map import FlowMap, Velocity
from .ema import Ema
from .faults import AgreedBatches
from .latents import Preparation
from .objective import Objective
from .recipe import Recipe
from .strategy import DataParallel


class Task(nn.Module):
    """A model and its objective: the module that is wrapped, so that DDP sees one forward a step."""

    objective: Objective

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        prepare: Preparation,
        teacher: Velocity | None = None,
        target: FlowMap | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.prepare = prepare
        self.precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        # Inside a tuple: what is frozen is no part of the module that is trained and saved.
        self._frozen = (teacher,) if target is None else (teacher, target)

    def forward(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of a batch as the loader gives it."""
        # Others, such as samplers in place of the loss, know of no target network.
        frozen = self._frozen if hasattr(self.objective, "uses_target") else self._frozen[:1]
        # Inside the wrapped module: DeepSpeed (0.19) switches off an autocast that is around it.
        half: Any = self.precision
        with torch.autocast(self.prepare.device.type, dtype=half, enabled=half is not None):
            return self.objective(self.model, self.prepare(samples), *frozen)


Hook = Callable[["Run", dict[str, Tensor]], None]


@dataclass
class Run:
    """Everything that a training run holds. `step` counts finished optimizer steps."""

    folder: Path
    recipe: Recipe
    model: nn.Module
    shapes: dict[str, tuple[int, ...]]  # of the whole parameters, by name
    strategy: DataParallel
    ema: Ema
    target: FlowMap | None  # that holds a mean of the weights, see target.py
    shards: ShardSet
    lineage: dict[str, Any]  # what a resumed run must share: seed, data set, teacher
    batches: AgreedBatches
    learning_rate: Callable[[int], float]
    hooks: list[Hook] = field(default_factory=list)
    step: int = 0
    stop_asked: bool = False
    evaluated: bool = True  # as far as it is due; no where that was stopped
    evaluated_s: float = 0.0  # spent on evaluations, which rates leave out
    latest: dict[str, float] = field(default_factory=dict)  # the last logged values

    @property
    def finished(self) -> bool:
        """Whether the last step of the recipe is done."""
        return self.step >= self.recipe.training.steps

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: the last step is done, and evaluated where that was asked for."""
        return self.finished and self.evaluated

    @property
    def save_due(self) -> bool:
        """Whether the step just done is one to go on from: a period ends, the last step, a stop was asked."""
        return self.finished or self.stop_asked or self.step % self.recipe.training.save_every == 0

    @property
    def samples(self) -> int:
        """Samples seen by all processes so far: the position in the data stream."""
        return self.step * self.recipe.data.batch_size

    def train(self) -> None:
        """Train until the recipe's last step, or to the end of the step in which a stop was asked."""
        while not (self.finished or self.stop_asked):
            batch = next(self.batches)
            with self.strategy.accumulate():
                losses = self.strategy.task(batch)
                self.strategy.backward(losses["loss"])
                self.strategy.step(self.learning_rate(self.step))
            self.step += self.strategy.stepped
            for hook in self.hooks:
                hook(self, losses)
