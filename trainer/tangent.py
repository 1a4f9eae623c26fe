"""Derivatives of a network along a direction: exact by forward mode, or by a central difference.

Attention has forward-mode derivatives in its plain (`MATH`) form only, on CPU and GPU alike, so the form is
forced inside; kernels are never swapped silently anywhere else.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Derivative = Literal["forward", "finite_difference"]


def time_derivative(
    function: Callable[[Tensor], Tensor], time: Tensor, *, how: Derivative
) -> tuple[Tensor, Tensor]:
    """Return f(time) and df/dtime for a function of times (B,) to (B, ...); both carry gradients if enabled.

    The central difference needs two more evaluations, with a step by dtype (1e-2 in fp32: flow-map networks
    have angular frequencies up to 100, and a shorter step drowns in rounding; 1e-5 in fp64).
    """
    if how == "forward":
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = forward_ad.make_dual(time, torch.ones_like(time))
            value, slope = forward_ad.unpack_dual(function(dual))
            return value, torch.zeros_like(value) if slope is None else slope
    step = 1e-5 if time.dtype == torch.float64 else 1e-2
    later, earlier = function(time + step), function(time - step)
    return function(time), (later - earlier) / (2 * step)
