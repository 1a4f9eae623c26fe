"""Guidance besides classifier-free guidance, on top of any velocity.

Source: rescaling: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2024, section
3.4; autoguidance: Karras et al., "Guiding a diffusion model with a bad version of itself", 2024.
"""

from torch import Tensor

from .condition import Condition
from .denoiser import Guided, mixed
from .flow_map import Velocity
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
        velocity = mixed(conditional, unconditional, t, scale=guided.scale, interval=guided.interval)
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
        strong, weak = (each.velocity(x, t, condition) for each in (self.inner, self.weak))
        return mixed(strong, weak, t, scale=self.scale, interval=self.interval)
