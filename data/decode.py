"""What the members of a sample mean to a trainer: pixels, moments of latents, or points.

A decoder may know a quick way for a batch of samples that are alike. Where they are not, it leaves them to
the way for one sample, which says what is wrong with which of them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from .members import PICTURES, read_bytes, read_npy, read_npys, read_pixels
from .reader import Sample
from .shards import ShardSet

Batch = dict[str, torch.Tensor]
Members = Sequence[bytes] | Sequence[memoryview]
Decoded = TypeVar("Decoded")
_FLOATS = (np.float16, np.float32, np.float64)


class Decoder(Protocol):
    """Turns the members of a sample into arrays."""

    @property
    def extensions(self) -> Collection[str]:
        """The members that it reads, besides the label."""
        ...

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode one sample."""
        ...


@runtime_checkable
class BatchDecoder(Protocol):
    """Decodes whole batches too, faster than one sample after another."""

    def many(self, samples: Sequence[Sample]) -> Batch | None:
        """Decode samples that are alike; nothing where they are not."""
        ...


@dataclass(frozen=True)
class Pixels:
    """A picture as `data`, float32 (channels, H, W) in [-1, 1]."""

    channels: int = 3
    extensions: Collection[str] = PICTURES

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode the sample's one picture."""
        return {"data": read_pixels(self._member(sample), self.channels)}

    def many(self, samples: Sequence[Sample]) -> Batch | None:
        """Decode pictures of one size straight to their places in the batch."""
        pictures = [
            _named(sample, lambda one: read_bytes(self._member(one), self.channels)) for sample in samples
        ]
        if any(picture.shape != pictures[0].shape for picture in pictures):
            return None
        pixels = np.empty((len(pictures), *pictures[0].shape), np.float32)
        # Place by place, as one picture stays in the processor's cache from step to step.
        for number, picture in enumerate(pictures):
            pixels[number] = picture
            pixels[number] /= 127.5
            pixels[number] -= 1
        return {"data": torch.from_numpy(pixels)}

    def _member(self, sample: Sample) -> bytes:
        extension = next((name for name in self.extensions if name in sample.members), None)
        if extension is None:
            raise ValueError(f"there is no picture; expected one of {', '.join(self.extensions)}")
        return sample.members[extension]


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

    def many(self, samples: Sequence[Sample]) -> Batch | None:
        """Decode moments of one shape and type."""
        return self.of_members([sample.members.get("moments.npy", b"") for sample in samples])

    def of_members(self, members: Members) -> Batch | None:
        """Decode the bytes of moments of one shape and type."""
        moments = _floats(members)
        if moments is None or moments.ndim != 5 or moments.shape[1] != 2:
            return None
        return _finite({"mean": moments[:, 0], "std": moments[:, 1]})


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

    def many(self, samples: Sequence[Sample]) -> Batch | None:
        """Decode points of one length and type."""
        return self.of_members([sample.members.get("points.npy", b"") for sample in samples])

    def of_members(self, members: Members) -> Batch | None:
        """Decode the bytes of points of one length and type."""
        points = _floats(members)
        return None if points is None or points.ndim != 2 else _finite({"data": points})


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
    if isinstance(decoder, BatchDecoder) and (batch := decoder.many(samples)) is not None:
        return batch
    decoded = [_named(sample, decoder) for sample in samples]
    return {name: _stack([arrays[name] for arrays in decoded], samples) for name in decoded[0]}


def _named(sample: Sample, decode: Callable[[Sample], Decoded]) -> Decoded:
    try:
        return decode(sample)
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


def _floats(members: Members) -> np.ndarray | None:
    """Copy `.npy` members of one size, header and floating type to one array (n, *shape)."""
    size = len(members[0])
    if size == 0 or any(len(member) != size for member in members):
        return None
    rows = np.frombuffer(bytearray().join(members), np.uint8).reshape(len(members), size)
    arrays = read_npys(rows)
    return arrays if arrays is not None and arrays.dtype in _FLOATS else None


def _finite(arrays: dict[str, np.ndarray]) -> Batch | None:
    """Convert (n, ...) arrays to float32; nothing if a number in them is not finite."""
    batch: Batch = {}
    for name, array in arrays.items():
        source = torch.from_numpy(array)
        target = torch.empty(source.shape)
        # The sum is a quick test: one number that is not finite makes it not finite too.
        if not torch.isfinite(target.copy_(source).sum()):
            return None
        batch[name] = target
    return batch
