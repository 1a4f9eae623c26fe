"""How large errors are at a pair of times: a small network, trained beside a model and no part of it."""

import torch
from torch import Tensor, nn

from .layers import Stage

_FREQUENCIES = 8
_WIDTH = 64


class LogVariance(Stage):
    """The logarithm w(s, t) of the usual error of a jump from s to t; 0 everywhere at birth.

    Waves of s and of s - t, of 1 to 8 radians, and one hidden layer; in fp32 or better.
    """

    num_inputs = 2

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4 * _FREQUENCIES, _WIDTH)
        self.outputs = nn.Linear(_WIDTH, 1)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def compute(self, s: Tensor, t: Tensor) -> Tensor:
        """Return w (B,) at times s and t (B,)."""
        with torch.autocast(s.device.type, enabled=False):
            times = torch.stack([s, s - t], dim=1).to(self.inputs.weight.dtype)
            scale = torch.arange(1, _FREQUENCIES + 1, dtype=times.dtype, device=times.device)
            angles = (times[:, :, None] * scale).flatten(1)
            hidden = self.inputs(torch.cat([angles.sin(), angles.cos()], dim=1))
            return self.outputs(nn.functional.silu(hidden)).squeeze(1)
