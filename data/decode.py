"""What the members of a sample mean to a trainer: pixels, moments of latents, or points."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .members import PICTURES, read_npy, read_pixels
from .reader import Sample
from .shards import ShardSet

Batch = dict[str, torch.Tensor]


class Decoder(Protocol):
    """Turns the members of a sample into arrays."""

    @property
    def extensions(self) -> Collection[str]:
        """The members that it reads, besides the label."""
        ...

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode one sample."""
        ...


@dataclass(frozen=True)
class Pixels:
    """A picture as `data`, float32 (channels, H, W) in [-1, 1]."""

    channels: int = 3
    extensions: Collection[str] = PICTURES

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode the sample's one picture."""
        extension = next((name for name in self.extensions if name in sample.members), None)
        if extension is None:
            raise ValueError(f"there is no picture; expected one of {', '.join(self.extensions)}")
        return {"data": read_pixels(sample.members[extension], self.channels)}


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a latent's distribution as `mean` and `std`, float32 (C, H, W)."""

    extensions: Collection[str] = ("moments.npy",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode `moments.npy`, (2, C, H, W) of any floating type."""
        moments = _array(sample, "moments.npy")
        if moments.ndim != 4 or len(moments) != 2 or moments.dtype.kind != "f":
            raise ValueError(f"moments.npy is {moments.dtype} {moments.shape}; expected float (2, C, H, W)")
        return {"mean": moments[0], "std": moments[1]}


@dataclass(frozen=True)
class Points:
    """A vector as `data`, float32 (D,)."""

    extensions: Collection[str] = ("points.npy",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode `points.npy`, (D,) of any floating type."""
        points = _array(sample, "points.npy")
        if points.ndim != 1 or points.dtype.kind != "f":
            raise ValueError(f"points.npy is {points.dtype} {points.shape}; expected float (D,)")
        return {"data": points}


def find_decoder(shards: ShardSet) -> Decoder:
    """Choose the decoder by the members that a data set has; pictures have the card's `channels`, or 3.

    Raises `ValueError` if the data set has no member that can be trained on.
    """
    if "moments.npy" in shards.extensions:
        return Moments()
    if "points.npy" in shards.extensions:
        return Points()
    if set(PICTURES) & set(shards.extensions):
        return Pixels(shards.info.get("channels", 3))
    raise ValueError(
        f"{shards.folder} has the members {', '.join(shards.extensions)}; "
        f"expected moments.npy (latents), points.npy or a picture ({', '.join(PICTURES)})"
    )


def decode_batch(samples: Sequence[Sample], decoder: Decoder) -> Batch:
    """Decode samples and stack what they give, in float32.

    Raises `ValueError` for a sample that cannot be decoded, is not finite, or has another shape; it is
    named.
    """
    decoded = [_decode(sample, decoder) for sample in samples]
    return {name: _stack([arrays[name] for arrays in decoded], samples) for name in decoded[0]}


def _decode(sample: Sample, decoder: Decoder) -> dict[str, np.ndarray]:
    try:
        return decoder(sample)
    except ValueError as error:
        raise ValueError(f"{sample.name}: {error}") from error


def _stack(arrays: Sequence[np.ndarray], samples: Sequence[Sample]) -> torch.Tensor:
    for array, sample in zip(arrays, samples, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{samples[0].name} has shape {arrays[0].shape} but {sample.name} has {array.shape}; "
                "the samples of a data set have one shape"
            )
    stacked = torch.from_numpy(np.stack(arrays)).float()
    # The sum is a quick test: one number that is not finite makes it not finite too.
    if not torch.isfinite(stacked.sum()):
        for array, sample in zip(arrays, samples, strict=True):
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{sample.name}: it holds numbers that are not finite; write the sample again"
                )
    return stacked


def _array(sample: Sample, extension: str) -> np.ndarray:
    if extension not in sample.members:
        raise ValueError(f"there is no {extension}, which other samples of the data set have")
    return read_npy(sample.members[extension])
