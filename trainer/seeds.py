"""Randomness as a function of (seed, position in the data stream, purpose).

Nothing here has a state. The noise of a sample depends on its position alone, so a checkpoint needs no
generator, a resumed run is exact, ranks never share noise, and neither world size nor accumulation changes
a loss.

The bits come from Threefry-2x32 with 20 rounds: a sample's key is the cipher of its position under (seed,
purpose), its numbers are the cipher of 0, 1, 2, ... under that key. Normals by Box and Muller, in float32, on
whatever device the positions are on.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.2 (known answers in
the tests).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return two words for two key words and two counter words: int32 tensors, broadcast, whose sums wrap."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    left, right = torch.broadcast_tensors(counter[0] + schedule[0], counter[1] + schedule[1])
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            low = (right >> (32 - rotation)).bitwise_and_((1 << rotation) - 1)  # >> drags the sign along
            right = (right << rotation).bitwise_or_(low).bitwise_xor_(left)
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + (group + 1)
    return left, right


def _words(number: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper 32 bits of int64 numbers as int32."""
    return number.to(torch.int32), (number >> 32).to(torch.int32)


@dataclass(frozen=True)
class Random:
    """The random numbers of a batch: `seed` of the run, `index` (B,) int64 positions in the data stream."""

    seed: int
    index: Tensor

    def _uniforms(self, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Return two tensors (B, count) of uniform numbers in (0, 1)."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()[:8]
        stream = torch.tensor(int.from_bytes(digest, "little", signed=True), device=self.index.device)
        key = threefry(_words(stream), _words(self.index))
        numbers = torch.arange(count, dtype=torch.int32, device=self.index.device)
        left, right = threefry((key[0][:, None], key[1][:, None]), (numbers, torch.zeros_like(numbers)))
        return _unit(left), _unit(right)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniform numbers (B, *shape) in (0, 1), float32."""
        return self._uniforms(purpose, math.prod(shape))[0].reshape(len(self.index), *shape)

    def normal(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return standard normal numbers (B, *shape), float32."""
        size = math.prod(shape)
        first, second = self._uniforms(purpose, (size + 1) // 2)
        radius, angle = (-2 * first.log()).sqrt(), (2 * math.pi) * second
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :size].reshape(len(self.index), *shape)


def _unit(word: Tensor) -> Tensor:
    """Return the upper 23 bits of a word as the middle of one of 2^23 cells of (0, 1), exact in float32."""
    return ((word >> 9).bitwise_and_(0x7FFFFF).float() + 0.5) * 2.0**-23
