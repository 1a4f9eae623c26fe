"""A residual perceptron for points (B, D): the smallest network that learns a two-time flow map."""

import math

import torch
from torch import Tensor, nn

from ..layers import Stage


class Block(Stage):
    """A residual layer (B, width), whose normalised input features of the times may scale and shift."""

    num_inputs = 2

    def __init__(self, width: int, time_width: int | None = None) -> None:
        super().__init__()
        # GroupNorm(1, ...) is layer norm, with the right gradient of its forward-mode derivative: see dit.py.
        # With weights of its own that derivative had another dtype under autocast (torch 2.13 on CPUs).
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width, affine=False), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.modulation = nn.Linear(time_width, 2 * width) if time_width else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def compute(self, hidden: Tensor, times: Tensor | None) -> Tensor:
        """Return the next features."""
        if self.modulation is None:
            return hidden + self.layers(hidden)
        scale, shift = self.modulation(times).chunk(2, dim=1)
        return hidden + self.layers[1:](self.layers[0](hidden) * (1 + scale) + shift)


class MLP(nn.Module):
    """A residual perceptron of the state, both times and an optional class.

    Forward: x (B, channels), s and t (B,) in [0, 1], labels (B,) in [0, num_classes] -> (B, channels); the
    label `num_classes` means "no class". With `state_frequencies` n it also sees sin and cos of pi k x, k = 1
    .. n: sharp edges in data of unit scale are learned in fewer steps. `modulated` lets the times scale and
    shift the features of every block, as in a DiT: one function of the state for each pair of times.
    """

    def __init__(
        self,
        *,
        channels: int = 2,
        width: int = 128,
        depth: int = 3,
        state_frequencies: int = 0,
        modulated: bool = False,
        num_classes: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.frequencies, self.state_frequencies = 8, state_frequencies
        seen = 4 * self.frequencies  # of the times
        self.inputs = nn.Linear(channels * (1 + 2 * state_frequencies) + seen, width)
        self.times = nn.Sequential(nn.Linear(seen, seen), nn.SiLU()) if modulated else None
        self.blocks = nn.ModuleList(Block(width, seen if modulated else None) for _ in range(depth))
        self.out_channels = out_channels or channels
        self.outputs = nn.Linear(width, self.out_channels)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.sample_shape = (channels,)
        self.null_label = num_classes or None

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the network's."""
        return self.outputs

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity (B, channels), or what there is in `out_channels`."""
        scale = torch.arange(1, self.frequencies + 1, dtype=x.dtype, device=x.device)
        waves = torch.arange(1, self.state_frequencies + 1, dtype=x.dtype, device=x.device) * math.pi
        times = [s[:, None] * scale, (s - t)[:, None] * scale]
        angles = torch.cat([*times, (x[:, :, None] * waves).flatten(1)], dim=1)
        sines, cosines = angles.sin(), angles.cos()
        hidden = self.inputs(torch.cat([x, sines, cosines], dim=1))
        seen = None
        if self.times is not None:
            of_times = slice(2 * self.frequencies)
            seen = self.times(torch.cat([sines[:, of_times], cosines[:, of_times]], dim=1))
        if self.labels is not None:
            missing = torch.full((len(x),), self.labels.num_embeddings - 1, device=x.device)
            hidden = hidden + self.labels(missing if condition is None else condition)
        for block in self.blocks:
            hidden = block(hidden, seen)
        return self.outputs(hidden)
