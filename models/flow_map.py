"""A flow map X_{s,t}(x) = x + (t - s) v(x, s, t): from the state at time s to the state at time t.

The network predicts the mean velocity v(x, s, t) over the jump. Two facts hold by construction, X_{s,s}(x)
= x and the velocity of the flow is the diagonal v(x, t, t); so a network trained by flow matching on the
diagonal already is a (bad) flow map, and distilling it only fills in s != t. Generation has t < s,
inversion t > s.

Source: Boffi, Albergo and Vanden-Eijnden, "Flow map matching", 2024, eq. 7; Geng et al., "Mean flows",
2025, eq. 3.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from .condition import Condition, Nothing, Scaled, Text, no_text, parted
from .log_variance import LogVariance
from .path import Linear, Path, expand


class Velocity(Protocol):
    """Anything with a marginal velocity dx/dt at (x, t): a flow map, a guided teacher, an exact oracle."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return dx/dt (B, ...) at the state x (B, ...) and the times t (B,)."""
        ...


@runtime_checkable
class Process(Protocol):
    """A model whose states at a time are no path's: those of a forward process of its own."""

    def state(
        self,
        data: Tensor,
        t: Tensor,
        *,
        draw: Callable[[str], Tensor],
        condition: Condition | None = None,
    ) -> Tensor:
        """Return x_t (B, ...) of data (B, ...) at times t (B,).

        `draw` gives standard normal noise (B, ...) for a purpose, by its name.
        """
        ...


class FlowMap(nn.Module):
    """The flow map of a backbone `(x, s, t, condition) -> tensor like x`, along the path that it learned.

    `log_variance` and `fake`, a map of the samples that this one makes, are there while an objective trains
    them with the model; nothing else needs them. `scale` is that of guidance where a condition carries none,
    for a network that takes it; 1 is none.
    """

    backbone: Any
    log_variance: LogVariance | None
    fake: "FlowMap | None"
    scale: float

    def __init__(self, backbone: nn.Module, path: Path | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.path = path or Linear()
        self.log_variance = None
        self.fake = None
        self.scale = 1.0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample x, such as (channels, height, width)."""
        return self.backbone.sample_shape

    @property
    def path_of_states(self) -> Path | None:
        """The path that its states are on; None where they are those of a process of its own."""
        return None if isinstance(self, Process) else self.path

    @property
    def text_width(self) -> int:
        """The width of the captions' embeddings that it takes, or 0 where it takes no captions."""
        return getattr(self.backbone, "text_width", 0)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes the scale of guidance, from 1 on, as an input."""
        return getattr(self.backbone, "guidance_input", False)

    def at_guidance(self, scale: float) -> Self:
        """Return this map, with the same weights, under guidance of another scale."""
        found = copy.copy(self)
        found.scale = scale
        return found

    @property
    def null_condition(self) -> Nothing | None:
        """The class label, or the caption, that says nothing; None for an unconditional backbone."""
        return no_text() if self.text_width else self.backbone.null_label

    def any_condition(self, count: int) -> Condition | None:
        """Return some conditions (count, ...) of the kind that it takes, for measuring and comparing."""
        null = self.null_condition
        if not isinstance(null, Text):
            return None if null is None else torch.arange(count) % null
        shape = (count, self.backbone.max_tokens, self.text_width)
        lengths = torch.arange(count) % (shape[1] + 1)
        tokens = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape).sin()
        return Text(tokens, torch.arange(shape[1]) < lengths[:, None])

    def predict(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return what the network says of x_s = x for a jump to t: here the mean velocity."""
        if not self.takes_guidance:
            if isinstance(condition, Scaled):
                raise ValueError(
                    "this network takes no scale of guidance; train one with guidance_input: true"
                )
            return self.backbone(x, s, t, condition)
        alone, scale = parted(condition, self.scale)
        scales = scale if isinstance(scale, Tensor) else torch.full_like(s, scale)
        return self.backbone(x, s, t, alone, scales)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return v(x, s, t) (B, ...), for times s and t (B,) in [0, 1]."""
        return self.predict(x, s, t, condition)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the diagonal v(x, t, t) = dx/dt."""
        return self.mean_velocity(x, t, t, condition)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return X_{s,t}(x) = x + (t - s) v(x, s, t)."""
        return x + expand(t - s, x) * self.mean_velocity(x, s, t, condition)
