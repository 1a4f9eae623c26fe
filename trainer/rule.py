"""What all rules of jumps share: pairs of times, the diagonal, whose velocity, and how errors are weighted.

A rule teaches a flow map X_{s,t}(x) = x + (t - s) v(x, s, t) two things at once. The diagonal samples of a
batch, t = s, learn the velocity: the teacher's, or without one the data's. The others are jumps, of either
sign of t - s, and learn what the rule says about v(x, s, t); only that differs from file to file. Jumps learn
from a velocity b, and in some rules from the network's own shorter jumps, both frozen:

    teacher      b is a frozen network's: the default where there is one
    self         b is the network's own diagonal v(x, s, s), or its target network's (target.py)
    conditional  b is the data's, alpha' data + sigma' noise, whose mean given x_s is the marginal velocity;
                 legal only where b is asked for at x_s itself and the gradient is linear in it
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.flow_map import FlowMap, Velocity
from ..models.path import Linear, expand
from .error_weighting import Constant, ErrorWeighting
from .guiding import SelfGuidance, refuse_guidance
from .objective import STRICT, Batch, Paths, Tangent, diagonal_error, mean_square
from .tangent import Derivative, time_derivative
from .times import Pairs

Source = Literal["teacher", "self", "conditional"]


class JumpError(NamedTuple):
    """The errors of jumps (B,): what is logged, and what is weighted and minimised; mostly the same."""

    raw: Tensor
    trained: Tensor

    @classmethod
    def of(cls, residual: Tensor) -> "JumpError":
        """Return the mean square of a residual (B, ...) as both."""
        error = mean_square(residual)
        return cls(error, error)


@dataclass(frozen=True, config=STRICT)
class Rule:
    """A rule of jumps; a subclass says their error, and what its usual velocity is."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = True

    path: Paths = Field(default_factory=Linear)
    pairs: Pairs = Field(default_factory=Pairs)
    velocity: Source | None = None  # None: the teacher's if there is one, else `usual_velocity`
    weighting: ErrorWeighting = Field(default_factory=Constant)
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance: SelfGuidance | None = None  # of the data's velocity

    @model_validator(mode="after")
    def _guidance_has_meaning(self) -> Self:
        refuse_guidance(self.guidance, condition_dropout=self.condition_dropout)
        return self

    @property
    def usual_velocity(self) -> Source:
        """Whose velocity jumps learn from where there is no teacher."""
        return "self"

    @property
    def asks_itself(self) -> bool:
        """Whether jumps learn from the network's own jumps, or from its velocity besides `velocity`."""
        return False

    def uses_target(self, *, taught: bool) -> bool:
        """Return whether a target network, with a teacher or without, would be asked for anything."""
        usual = "teacher" if taught else self.usual_velocity
        return self.asks_itself or self.guidance is not None or (self.velocity or usual) == "self"

    def times_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return source and target (B,) of each sample, the same ones for a diagonal sample."""
        return self.pairs.sample(batch.random, batch.step)

    def diagonal_error(self, model: FlowMap, batch: Batch, t: Tensor, teacher: Velocity | None) -> Tensor:
        """Return the errors of the velocity at t (B,)."""
        return diagonal_error(model, self.path, batch, t, teacher)

    def jump_error(
        self,
        model: FlowMap,
        batch: Batch,
        s: Tensor,
        t: Tensor,
        *,
        velocity: Velocity | None,
        target: FlowMap,
    ) -> JumpError:
        """Return the errors of jumps from s to t (B,).

        `velocity` is what to learn from, None that of the data; `target` is the network whose jumps may be.
        """
        raise NotImplementedError

    def __call__(
        self,
        model: FlowMap,
        batch: Batch,
        teacher: Velocity | None = None,
        target: FlowMap | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss and the raw errors of jumps and diagonal, jumps first."""
        batch = batch.with_condition_dropped(self.condition_dropout, null=model.null_condition)
        batch = batch.of_teacher(teacher)
        s, t = (time.to(batch.data.dtype) for time in self.times_of(batch))
        jumps = t != s
        target = model if target is None else target
        of_data = self.guidance.by(target) if self.guidance and teacher is None else None
        diagonal = self.diagonal_error(model, batch.take(~jumps), s[~jumps], teacher or of_data)
        raw, trained = self.jump_error(
            model,
            batch.take(jumps),
            s[jumps],
            t[jumps],
            velocity=self._velocity(teacher, target) or of_data,
            target=target,
        )
        order = torch.cat([jumps.nonzero(), (~jumps).nonzero()]).squeeze(1)
        s, t = s[order], t[order]
        return {
            "loss": self.weighting(torch.cat([trained, diagonal]), s, t, model).mean(),
            "error": torch.cat([raw, diagonal]),
            "time": s,
            "gap": (t - s).abs(),
            "index": batch.random.index[order],
            "error_jump": raw,
            "error_diagonal": diagonal,
        }

    def _velocity(self, teacher: Velocity | None, target: FlowMap) -> Velocity | None:
        """Return the velocity that jumps learn from; None is the conditional one."""
        source = self.velocity or ("teacher" if teacher is not None else self.usual_velocity)
        if source == "teacher" and teacher is None:
            raise ValueError("velocity: teacher, but there is no teacher; give one, or remove velocity")
        return {"teacher": teacher, "self": target, "conditional": None}[source]


@dataclass(frozen=True, config=STRICT)
class Tangents:
    """How the semigradient g = b + correction - v is tamed; all off by default.

    In order: the correction, the term with the derivative, grows linearly to its whole size in `warmup_steps`
    optimizer steps; g becomes g / (|g| / sqrt(D) + normalise), of about unit size in each of D dimensions;
    its elements are cut off at +-clamp.

    Source: Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", 2025,
    section 4.1, where the norm is not divided by sqrt(D).
    """

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    normalise: Annotated[float, Field(gt=0)] | None = None
    clamp: Annotated[float, Field(gt=0)] | None = None

    def error(self, v: Tensor, correction: Tensor, velocity: Tensor, *, step: Tensor) -> JumpError:
        """Return the error of v - correction - velocity (B, ...): raw, and with g as it is tamed here."""
        residual = v - correction - velocity
        raw = mean_square(residual)
        if self == Tangents():
            return JumpError(raw, raw)
        if self.warmup_steps:
            share = ((step.floor() + 1) / self.warmup_steps).clamp(max=1).to(residual.dtype)
            residual = v - expand(share, v) * correction - velocity
        wanted = residual.detach()
        if self.normalise is not None:
            wanted = wanted / expand(mean_square(wanted).sqrt() + self.normalise, wanted)
        if self.clamp is not None:
            wanted = wanted.clamp(-self.clamp, self.clamp)
        return JumpError(raw, mean_square(residual + (wanted - residual).detach()))


@dataclass(frozen=True, config=STRICT)
class DerivativeRule(Rule):
    """A rule of a derivative of the mean velocity v in a time.

    gradient    residual: that of the squared residual, through v and its derivative
                semigradient: that of a regression of v onto all the rest, frozen
    derivative  forward: exact; finite_difference: two more evaluations, of any network on any strategy
    """

    gradient: Literal["residual", "semigradient"] = "residual"
    derivative: Derivative = "forward"
    tangents: Tangents = Field(default_factory=Tangents)

    @model_validator(mode="after")
    def _tangents_have_effect(self) -> Self:
        if self.gradient == "residual" and self.tangents != Tangents():
            raise ValueError(
                "tangents tame a semigradient, and gradient residual has none; set gradient to semigradient, "
                "or remove tangents"
            )
        return self

    @property
    def tangent(self) -> Tangent:
        """The derivative that it takes; the residual differentiates it again."""
        if self.derivative == "finite_difference":
            return "finite_difference"
        return "forward_with_gradient" if self.gradient == "residual" else "forward"

    def value_and_slope(
        self, function: Callable[[Tensor], Tensor], time: Tensor, *, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return f(time), with gradient, and df/dtime, with gradient for the residual; times are (B,).

        Differences cross neither the `other` time of the jump nor the limits of all times: a network need
        know nothing of what is beyond.
        """
        low, high = (torch.full_like(time, limit) for limit in self.pairs.limits)
        within = torch.where(other < time, other, low), torch.where(other > time, other, high)
        if self.gradient == "residual":
            return time_derivative(function, time, how=self.derivative, within=within)
        value = function(time)
        with torch.no_grad():
            _, slope = time_derivative(function, time, how=self.derivative, within=within, value=value)
        return value, slope
