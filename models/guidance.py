"""Guidance besides classifier-free guidance, on top of any velocity.

Source: rescaling: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2024, section
3.4; autoguidance: Karras et al., "Guiding a diffusion model with a bad version of itself", 2024; guidance
that is learned from data: Geng et al., "Mean flows", 2025, eq. 21.
"""

import torch
from torch import Tensor

from .condition import Condition, parted, says_nothing, take
from .denoiser import Guided, mixed
from .flow_map import FlowMap, Velocity
from .path import expand


class Rescaled:
    """Classifier-free guidance whose velocity keeps the spread of the conditional one, by a share.

    b = share (std(b_c) / std(b_g)) b_g + (1 - share) b_g, with std over the numbers of one sample, b_g guided
    and b_c conditional. On a variance-preserving path a velocity is v times the speed of the path: the
    paper's rescaling of v.
    """

    evaluations = Guided.evaluations

    def __init__(self, guided: Guided, share: float) -> None:
        self.guided, self.share = guided, share

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the rescaled velocity (B, ...)."""
        guided = self.guided
        conditional, unconditional = guided.both(x, t, condition)
        _, scale = parted(condition, guided.scale)
        velocity = mixed(conditional, unconditional, t, scale=scale, interval=guided.interval)
        ratio = conditional.flatten(1).std(1) / velocity.flatten(1).std(1)
        return expand(1 + self.share * (ratio - 1), x) * velocity


class Autoguided:
    """b_weak + scale (b - b_weak) inside `interval`, b outside; both on one path and under one condition.

    The weak velocity is that of a smaller or less trained network, such as an early checkpoint's.
    """

    def __init__(
        self, inner: Velocity, weak: Velocity, scale: float, *, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.inner, self.weak, self.scale, self.interval = inner, weak, scale, interval
        self.evaluations = getattr(inner, "evaluations", 1) + getattr(weak, "evaluations", 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the guided velocity (B, ...)."""
        alone, scale = parted(condition, self.scale)
        strong, weak = (each.velocity(x, t, alone) for each in (self.inner, self.weak))
        return mixed(strong, weak, t, scale=scale, interval=self.interval)


class SelfGuided:
    """The velocity of data, guided by the network that learns it: what it learns needs no guidance later.

        v_g = scale (1 - kappa) v + kappa v_c + (1 - kappa) (1 - scale) v_0

    with v the velocity of the data at x_t and v_c, v_0 those of the network, frozen, under the condition and
    without. A network that has learned the mean b_g of v_g has v_c = b_g, so b_g = v_0 + scale (b - v_0)
    whatever kappa; with kappa = 1 - 1 / scale it is v_g = v + kappa (v_c - v_0). Samples without a condition
    and times outside `interval` keep v.
    """

    def __init__(
        self, network: FlowMap, scale: float, *, kappa: float, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.network, self.scale, self.kappa, self.interval = network, scale, kappa, interval

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return what the network has learned of it (B, ...), for states that belong to no data."""
        return self.network.velocity(x, t, condition)

    @torch.no_grad()
    def guided(self, velocity: Tensor, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """Return v_g (B, ...) of the data's velocity (B, ...) at x (B, ...) and t (B,)."""
        nothing = self.network.null_condition
        if condition is None or nothing is None:
            raise ValueError("guidance needs a model of classes or captions, and data that have them")
        low, high = self.interval
        rows = (t >= low) & (t <= high) & ~says_nothing(condition, nothing)
        # A sharded network has to be called by all processes, also by one that has no such row.
        own = Guided(self.network, self.scale, null_condition=nothing)
        conditional, unconditional = own.both(x[rows], t[rows], take(condition, rows))
        of_data, of_nothing = self.scale * (1 - self.kappa), (1 - self.kappa) * (1 - self.scale)
        guided = of_data * velocity[rows] + self.kappa * conditional + of_nothing * unconditional
        return velocity.index_put((rows,), guided.to(velocity.dtype))
