"""Inception-v3 as the FID has it: the network only, for weights that are at hand.

Layers have the names under which its weights are passed on in PyTorch, in a file
`pt_inception-2015-12-05-6726825d.pth`. It differs from the published network in its pools: means leave out
the padding, and the last block takes the greatest of neighbours instead of their mean.

Source: Szegedy et al., "Rethinking the Inception architecture", 2016, table 1 and figures 5 to 7; Heusel et
al., 2017, whose TensorFlow graph of 2015-12-05 has those pools.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 2048
Step = tuple[int, Any]  # features, and the side of a square kernel or (height, width)


class Convolution(nn.Module):
    """A convolution, batch normalisation and a rectifier; a stride of 2 goes without padding."""

    def __init__(self, inputs: int, step: Step, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        features, kernel = step
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, features, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(features, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations (B, features, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, and a pool; what they give is joined channel by channel.

    `split` steps at the end of a chain each take what it gives. Without `pooled` features the block halves
    the picture: the last step of every chain has stride 2, and so has the pool.
    """

    def __init__(
        self,
        inputs: int,
        chains: dict[str, list[Step]],
        *,
        pooled: int | None = None,
        split: Mapping[str, list[Step]] = MappingProxyType({}),
        greatest: bool = False,
    ) -> None:
        super().__init__()
        self.greatest = greatest
        self.chains: list[tuple[list[str], list[str]]] = []
        for branch, steps in chains.items():
            width, names = inputs, []
            for place, step in enumerate(steps, start=1):
                alone = len(steps) == 1 and branch not in split
                names.append(branch if alone else f"{branch}_{place}")
                last = place == len(steps) and pooled is None
                self.add_module(names[-1], Convolution(width, step, stride=2 if last else 1))
                width = step[0]
            ends = []
            for letter, step in zip("ab", split.get(branch, []), strict=False):
                ends.append(f"{branch}_{len(steps) + 1}{letter}")
                self.add_module(ends[-1], Convolution(width, step))
            self.chains.append((names, ends))
        self.branch_pool = Convolution(inputs, (pooled, 1)) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels of all chains, H, W)."""
        outputs = []
        for names, ends in self.chains:
            y = x
            for name in names:
                y = self.get_submodule(name)(y)
            outputs += [self.get_submodule(name)(y) for name in ends] or [y]
        if self.branch_pool is None:
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        pool = (
            F.max_pool2d(x, 3, 1, padding=1)
            if self.greatest
            else F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        )
        return torch.cat([*outputs, self.branch_pool(pool)], 1)


def _early(inputs: int, pooled: int) -> Mixed:
    chains: dict[str, list[Step]] = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)]}
    return Mixed(inputs, chains | {"branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, pooled=pooled)


def _middle(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    chains: dict[str, list[Step]] = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
    }
    return Mixed(768, chains, pooled=192)


def _late(inputs: int, *, greatest: bool) -> Mixed:
    ends: list[Step] = [(384, (1, 3)), (384, (3, 1))]
    chains: dict[str, list[Step]] = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1)]}
    chains["branch3x3dbl"] = [(448, 1), (384, 3)]
    split = {"branch3x3": ends, "branch3x3dbl": ends}
    return Mixed(inputs, chains, pooled=192, split=split, greatest=greatest)


class Inception(nn.Module):
    """From pictures (B, 3, 299, 299) in [-1, 1] to their features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, (32, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, (32, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, (64, 3))
        self.Conv2d_3b_1x1 = Convolution(64, (80, 1))
        self.Conv2d_4a_3x3 = Convolution(80, (192, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _early(192, 32), _early(256, 64), _early(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b, self.Mixed_6c = _middle(128), _middle(160)
        self.Mixed_6d, self.Mixed_6e = _middle(160), _middle(192)
        longer: list[Step] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": longer})
        self.Mixed_7b, self.Mixed_7c = _late(1280, greatest=False), _late(2048, greatest=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the last block, averaged over the picture."""
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))
