"""Derivatives of a network along a direction: exact by forward mode, or by a difference.

Whatever moves with the time may be written into the function: the derivative of s -> v(x + (s - s0) b, s, t)
at s0 is that along the direction (b, 1) of (x, s).

Attention has forward-mode derivatives in its plain (`MATH`) form only, on CPU and GPU alike, so the form is
forced inside; kernels are never swapped silently anywhere else.
"""

import importlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.path import expand

Derivative = Literal["forward", "finite_difference"]
Interval = tuple[Tensor, Tensor]  # of times, both (B,)


def load_forward_rules() -> None:
    """Load torch's forward-mode rules, which it parses from their source, before other threads parse any.

    Else torch loads them at the first derivative. Python 3.11 fails where two threads parse at a time
    ("AST constructor recursion depth mismatch"), and numpy parses the headers of arrays.
    """
    importlib.import_module("torch._decomp.decompositions_for_jvp")


def time_derivative(
    function: Callable[[Tensor], Tensor],
    time: Tensor,
    *,
    how: Derivative,
    within: Interval | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return f(time) and df/dtime for a function of times (B,) to (B, ...); both carry gradients if enabled.

    A difference needs two more evaluations, at times inside the interval `within` if it is given; f(time) is
    not evaluated again if `value` is given.
    """
    if how == "forward":
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = forward_ad.make_dual(time, torch.ones_like(time))
            value, slope = forward_ad.unpack_dual(function(dual))
            return value, torch.zeros_like(value) if slope is None else slope
    value = function(time) if value is None else value
    first, second = _offsets(time, within)
    slope = _weighted(second / first / (second - first), function(time + first) - value)
    return value, slope - _weighted(first / second / (second - first), function(time + second) - value)


def _offsets(time: Tensor, within: Interval | None) -> tuple[Tensor, Tensor]:
    """Return where else (B,) to evaluate: on both sides, or where an end is near, twice on the longer one.

    Both lead to an error of order step^2 by the parabola through three points. The step is by dtype, as a
    shorter one drowns in rounding: 1e-2 in fp32, as flow-map networks have angular frequencies up to 100;
    3e-2 where the network computes in half precision; 1e-5 in fp64.
    """
    half = torch.is_autocast_enabled(time.device.type)
    step = torch.full_like(time, 3e-2 if half else 1e-5 if time.dtype == torch.float64 else 1e-2)
    if within is None:
        return step, -step
    below, above = time - within[0], within[1] - time
    shorter, longer = torch.minimum(below, above), torch.maximum(below, above)
    aside = torch.minimum(step, longer / 2) * torch.where(above >= below, 1.0, -1.0)
    central = shorter >= step
    return torch.where(central, step, aside), torch.where(central, -step, 2 * aside)


def _weighted(weight: Tensor, difference: Tensor) -> Tensor:
    return expand(weight, difference) * difference
