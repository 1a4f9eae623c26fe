"""Shards of small random latents in two classes, for runs of networks of pictures."""

from pathlib import Path

import numpy as np

from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardSet, ShardWriter, index_shards


def write_latents(folder: Path, *, n: int = 60, side: int = 4, channels: int = 2) -> ShardSet:
    """Write `n` samples whose class moves their mean."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(n):
            mean = generator.standard_normal((channels, side, side)) + number % 2
            moments = np.stack([mean, np.full_like(mean, 0.1)]).astype(np.float32)
            members = {"moments.npy": npy_bytes(moments), "cls": str(number % 2).encode()}
            writer.write(f"{number:03d}", members)
    return index_shards(folder)
