"""A flow map X_{s,t}(x) = x + (t - s) v(x, s, t): from the state at time s to the state at time t.

The network predicts the mean velocity v(x, s, t) over the jump. Two facts hold by construction, X_{s,s}(x)
= x and the velocity of the flow is the diagonal v(x, t, t); so a network trained by flow matching on the
diagonal already is a (bad) flow map, and distilling it only fills in s != t. Generation has t < s,
inversion t > s.

Source: Boffi, Albergo and Vanden-Eijnden, "Flow map matching", 2024, eq. 7; Geng et al., "Mean flows",
2025, eq. 3.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from .path import expand


class Velocity(Protocol):
    """Anything with a marginal velocity dx/dt at (x, t): a flow map, a guided teacher, an exact oracle."""

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return dx/dt (B, ...) at the state x (B, ...) and the times t (B,)."""
        ...


class FlowMap(nn.Module):
    """The flow map of a backbone `(x, s, t, condition) -> tensor like x`."""

    backbone: Any

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample x, such as (channels, height, width)."""
        return self.backbone.sample_shape

    @property
    def null_condition(self) -> int | None:
        """The class label that means "no class", or None for an unconditional backbone."""
        return self.backbone.null_label

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return v(x, s, t) (B, ...), for times s and t (B,) in [0, 1]."""
        return self.backbone(x, s, t, condition)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the diagonal v(x, t, t) = dx/dt."""
        return self.mean_velocity(x, t, t, condition)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return X_{s,t}(x) = x + (t - s) v(x, s, t)."""
        return x + expand(t - s, x) * self.mean_velocity(x, s, t, condition)
