"""Distributions of one time t, and of pairs (s, t) for jumps; t = 0 is data, t = 1 noise.

Sources: logit-normal times: Esser et al. 2024, eq. 19; their shift, more noise for larger pictures: eq. 23;
pairs as two sorted draws: Geng et al. 2025, section 4.3.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.path import shifted
from .objective import STRICT
from .seeds import Random


@dataclass(frozen=True, config=STRICT)
class Uniform:
    """Times uniform on (0, 1), then shifted towards noise."""

    name: Literal["uniform"] = "uniform"
    shift: Annotated[float, Field(gt=0)] = 1.0

    def sample(self, random: Random, purpose: str = "time") -> Tensor:
        """Return times (B,)."""
        return shifted(random.uniform(purpose), self.shift)


@dataclass(frozen=True, config=STRICT)
class LogitNormal:
    """Times sigmoid(mean + std N(0, 1)): most of them in the middle of the path.

    A shift adds log(shift) to the mean. On the linear path these are EDM's log-normal sigma = t / (1 - t).
    """

    name: Literal["logit_normal"]
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0

    def sample(self, random: Random, purpose: str = "time") -> Tensor:
        """Return times (B,)."""
        return shifted(torch.sigmoid(self.mean + self.std * random.normal(purpose)), self.shift)


Times = Annotated[Uniform | LogitNormal, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class Pairs:
    """Pairs (s, t) of a source and a target not after it: two sorted draws of `times`.

    A share `diagonal` of the samples has t = s. Of the others, the jumps, a share `from_noise` starts at s
    = 1 and a share `to_data` ends at t = 0, drawn independently; with both, some are the whole way at once.
    """

    times: Times = Field(default_factory=Uniform)
    diagonal: Annotated[float, Field(ge=0, le=1)] = 0.25
    from_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    to_data: Annotated[float, Field(ge=0, le=1)] = 0.0

    def sample(self, random: Random) -> tuple[Tensor, Tensor]:
        """Return s and t (B,), with t <= s."""
        first, second = self.times.sample(random, "time"), self.times.sample(random, "target time")
        s, t = torch.maximum(first, second), torch.minimum(first, second)
        s = torch.where(random.uniform("from noise") < self.from_noise, torch.ones_like(s), s)
        t = torch.where(random.uniform("to data") < self.to_data, torch.zeros_like(t), t)
        on_diagonal = random.uniform("diagonal") < self.diagonal
        s = torch.where(on_diagonal, first, s)
        return s, torch.where(on_diagonal, s, t)
