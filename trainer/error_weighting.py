"""What is minimised of the error of a jump: a function of each sample's error L(s, t), its mean square.

All in fp32 or better. Errors are means over a sample's dimensions, so no setting depends on their number. The
raw error is always logged beside what is minimised.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.flow_map import FlowMap
from ..models.log_variance import LogVariance
from .objective import STRICT

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class Constant:
    """L itself."""

    name: Literal["constant"] = "constant"
    learned: ClassVar[bool] = False

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        return _precise(error)


@dataclass(frozen=True, config=STRICT)
class Adaptive:
    """L / sg(L + c)^power: jumps whose error is large do not drown the others.

    With power 1 the loss is L / (L + c), about 1 for ever whatever is learned: look at the raw error. Source:
    Geng et al., "Mean flows", 2025, section 4.3, where c is of the sum of squares, not their mean.
    """

    name: Literal["adaptive"]
    power: Positive = 1.0
    c: Positive = 1e-3
    learned: ClassVar[bool] = False

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        error = _precise(error)
        return error / (error.detach() + self.c) ** self.power


@dataclass(frozen=True, config=STRICT)
class PseudoHuber:
    """sqrt(L + c^2) - c: half the squared residual, over c, where it is short, its length where it is long.

    Source: Song and Dhariwal, "Improved techniques for training consistency models", 2024, section 3.3:
    its c is 0.00054 times the root of the number of dimensions, by which both sides are divided here.
    """

    name: Literal["pseudo_huber"]
    c: Positive = 0.00054
    learned: ClassVar[bool] = False

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        error = _precise(error)
        return error / ((error + self.c**2).sqrt() + self.c)  # the difference, without its cancellation


@dataclass(frozen=True, config=STRICT)
class BySource:
    """s (1 - s)^power L: less for jumps from both ends of the path. Source: AnyFlow, power 1/2."""

    name: Literal["source"]
    power: Positive = 0.5
    learned: ClassVar[bool] = False

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        return s * (1 - s) ** self.power * _precise(error)


@dataclass(frozen=True, config=STRICT)
class Learned:
    """exp(-w) L + w with w(s, t) learned: at best w = log E[L | s, t], and all pairs of times count alike.

    Source: Kendall, Gal and Cipolla, "Multi-task learning using uncertainty", 2018, section 3.2; for times:
    Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024.
    """

    name: Literal["learned"]
    learned: ClassVar[bool] = True

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        w = _log_variance(model, s, t)
        return (-w).exp() * _precise(error) + w


@dataclass(frozen=True, config=STRICT)
class Cauchy:
    """log(1 + exp(-w) L) + w / 2, of residuals with Cauchy's heavy tails: outliers hardly count.

    exp(w) is `scale`, or it is learned for every s and t: then w tends to the logarithm of a usual L, an
    outlier leaves it where it is, and all pairs of times count alike.
    """

    name: Literal["cauchy"]
    scale: Positive | Literal["learned"] = "learned"

    @property
    def learned(self) -> bool:
        """Whether it needs the model's log-variance."""
        return self.scale == "learned"

    def __call__(self, error: Tensor, s: Tensor, t: Tensor, model: FlowMap) -> Tensor:
        """Return the losses (B,) of errors (B,) of jumps from s to t (B,)."""
        if self.scale == "learned":
            w = _log_variance(model, s, t)
            return torch.log1p((-w).exp() * _precise(error)) + w / 2
        return torch.log1p(_precise(error) / self.scale)


ErrorWeighting = Annotated[
    Constant | Adaptive | PseudoHuber | BySource | Learned | Cauchy, Field(discriminator="name")
]


def log_variance_of(objective: Any) -> LogVariance | None:
    """Return the log-variance, newly initialised, that the loss of an objective needs, if it needs one.

    It belongs to a run, not to what the run learns: other errors have another one.
    """
    learned = getattr(getattr(objective, "weighting", None), "learned", False)
    return LogVariance() if learned else None


def _precise(error: Tensor) -> Tensor:
    return error.to(torch.promote_types(error.dtype, torch.float32))


def _log_variance(model: FlowMap, s: Tensor, t: Tensor) -> Tensor:
    assert model.log_variance is not None, "whoever makes the model gives it `log_variance_of(objective)`"
    return model.log_variance(s, t)
