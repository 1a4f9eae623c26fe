"""DiffFlow: a drift that takes data to noise, and a score that leads back, trained together by the bound.

    loss = -E[w] / D,   w the weight of a path that is simulated to noise (models/path_weight.py)

D the number of dimensions: a bound on -log p(data) in nats a dimension. See models/diffflow.py for the chains
and what the networks say.

    {}                                         almost a flow: constant g, as published for points
    {path: {name: linear_betas}, exponent: 1}  DDPM with a drift that is 0 at birth: starts at DDPM's bound
`shared` has one network for both, with `model.out_channels` of twice the channels.

A step of training costs N + 1 evaluations with their gradients. `num_steps` is N, or with progressive
refinement a list of [first step of training, N], such as [[0, 5], [5000, 10], [15000, 30]]. Times are
(n / N)^(1 / exponent), whose steps grow towards noise for exponents below 1; a flexible grid draws one time
in each of N - 1 cells of that grid anew at each step of training, the same for all samples, so that f and s
are learned at all times and any N can be used later.

Sources: Zhang and Chen, "Diffusion normalizing flow", 2021, section 4 (the exponent as in their code, the
inverse of the one in the text); learned variance: Nichol and Dhariwal, 2021.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...models.diffflow import Betas
from ...models.diffflow import DiffFlow as Chains
from ...models.flow_map import Velocity
from ...models.path import Prediction
from ...models.path_weight import path_weight
from ...models.volatility import Constant, Volatility
from ..objective import STRICT, Batch, Tangent
from ..seeds import Random

Count = Annotated[int, Field(ge=2)]
Stage = tuple[Annotated[int, Field(ge=0)], Count]  # the first step of training, N
AT_ONCE = 10  # steps whose noise is drawn in one call, which costs as much as one of them on small batches
TRAINING_ONLY = ("num_steps", "flexible", "condition_dropout")


@dataclass(frozen=True, config=STRICT)
class DiffFlow:
    """Train drift and score; `volatility` is g without a path (None: constant), on which it has no effect.

    `reverse_variance`: that of the steps back is tied to the steps forward, or is learned besides, one factor
    a step or by the network for each dimension. `data_std` is the spread of the data that v is scaled by.
    """

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    path: Betas | None = None
    prediction: Prediction = "noise"
    data_std: Annotated[float, Field(gt=0)] = 1.0
    volatility: Volatility | None = None
    learned_volatility: bool = False
    reverse_variance: Literal["tied", "step", "network"] = "tied"
    shared: bool = False
    num_steps: Count | Annotated[tuple[Stage, ...], Field(min_length=1)] = 30
    exponent: Annotated[float, Field(gt=0)] = 0.9
    flexible: bool = False
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _has_effect_and_meaning(self) -> Self:
        if self.path is not None and (self.volatility is not None or self.learned_volatility):
            raise ValueError("the path says the noise: remove volatility and learned_volatility, or the path")
        if self.path is None and self.prediction != "noise":
            raise ValueError("prediction has no effect without a path: the network says the score; remove it")
        if self.data_std != 1 and self.prediction != "v":
            raise ValueError(
                f"data_std has no effect on prediction {self.prediction}; remove it, or predict v"
            )
        starts = [start for start, _ in self._stages]
        if starts[0] != 0 or any(after <= before for before, after in pairwise(starts)):
            raise ValueError(
                f"num_steps: stages start at the steps {starts} of training, expected 0 and growing numbers"
            )
        return self

    def meaning(self) -> dict[str, Any]:
        """Return what makes a model of a backbone."""
        said = TypeAdapter(DiffFlow).dump_python(self, mode="json")
        if self.path is None and self.volatility is None:
            said["volatility"] = TypeAdapter(Constant).dump_python(Constant(), mode="json")
        kept = {key: value for key, value in said.items() if key not in TRAINING_ONLY}
        return {"kind": "diffflow", **kept, "num_steps": self._stages[-1][1]}

    def __call__(self, model: Chains, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return the loss, its parts in nats a dimension, and the number of steps."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        grid = self.grid(model, batch)
        noise = noise_of_path(batch, len(grid) - 1)
        weight, end = path_weight(model, batch.data, grid, noise, batch.condition)
        error = -weight / batch.data[0].numel()
        return {
            "loss": error.mean(),
            "end_square": end.detach().square().mean(),  # 1 where the data have become noise
            "num_steps": error.new_tensor(len(grid) - 1),
            "error": error,
            "index": batch.random.index,
        }

    def grid(self, model: Chains, batch: Batch) -> Tensor:
        """Return the times (N + 1,) of a batch: those of its step of training, else of the last stage."""
        step, num_steps = batch.step[:1].floor().long(), self._stages[-1][1]
        if len(self._stages) > 1 and batch.batch_size is not None:
            num_steps = [number for start, number in self._stages if start <= step.item()][-1]
        if not self.flexible:
            return model.grid(num_steps)
        draws = Random(batch.random.seed, step).uniform("times of the grid", (num_steps - 1,)).double()[0]
        cells = torch.arange(num_steps - 1, dtype=torch.float64, device=draws.device)
        inner = ((cells + draws) / (num_steps - 1)) ** (1 / self.exponent)
        return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])

    @property
    def _stages(self) -> tuple[tuple[int, int], ...]:
        return ((0, self.num_steps),) if isinstance(self.num_steps, int) else self.num_steps


def noise_of_path(batch: Batch, num_steps: int, *, path: str = "") -> Callable[[int], Tensor]:
    """Return the noise (B, ...) of each step 1 .. N, drawn for several steps at a time and kept for those."""
    shape = (AT_ONCE, *batch.data.shape[1:])
    held: dict[int, Tensor] = {}

    def noise(n: int) -> Tensor:
        assert 1 <= n <= num_steps
        part, place = divmod(n - 1, AT_ONCE)
        if part not in held:
            held.clear()
            held[part] = batch.random.normal(f"noise{path} {part}", shape)
        return held[part][:, place]

    return noise
