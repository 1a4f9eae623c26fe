"""What the members of a sample mean to a trainer: pixels, moments of latents, points, or states of a flow.

Values stay in the type that they are stored in, which is a half or a quarter of the bytes to copy on the way
to the device; `floats` turns them into what a network takes, there.

A decoder may know a quick way for one member of many samples that are alike. Where they are not, it leaves
them to the way for one sample, which says what is wrong with which of them.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .members import PICTURES, Bytes, read_npy, read_npys, read_pixels
from .reader import Sample
from .shards import ShardSet

Batch = dict[str, Tensor]
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
    """Decodes whole batches of one member too, faster than one sample after another."""

    @property
    def extensions(self) -> Collection[str]:
        """The members that it reads; the quick way takes samples of one."""
        ...

    @property
    def workers(self) -> int:
        """How many threads beside the reading one pay: decoding lets other threads run."""
        ...

    def stack(self, members: Iterable[Bytes], count: int) -> Batch | None:
        """Decode `count` samples that are alike; nothing where they are not."""
        ...


@runtime_checkable
class RowDecoder(Protocol):
    """Decodes whole batches of one member whose bytes are of one size."""

    @property
    def extensions(self) -> Collection[str]:
        """The one member that it reads."""
        ...

    def of_rows(self, rows: np.ndarray) -> Batch | None:
        """Decode bytes (n, size) of samples that are alike; nothing where they are not."""
        ...


@dataclass(frozen=True)
class Pixels:
    """A picture as `data`, uint8 (channels, H, W)."""

    channels: int = 3
    extensions: Collection[str] = PICTURES
    workers = 4

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode the sample's one picture."""
        extension = next((name for name in self.extensions if name in sample.members), None)
        if extension is None:
            raise ValueError(f"there is no picture; expected one of {', '.join(self.extensions)}")
        return {"data": read_pixels(sample.members[extension], self.channels)}

    def stack(self, members: Iterable[Bytes], count: int) -> Batch | None:
        """Decode pictures of one size straight to their places in the batch."""
        pixels = np.empty(0, np.uint8)
        try:
            for place, member in enumerate(members):
                picture = read_pixels(member, self.channels)
                if place == 0:
                    pixels = np.empty((count, *picture.shape), np.uint8)
                if picture.shape != pixels.shape[1:]:
                    return None
                pixels[place] = picture
        except ValueError:
            return None
        return {"data": torch.from_numpy(pixels)}


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a latent's distribution as `mean` and `std`, (C, H, W)."""

    extensions: Collection[str] = ("moments.npy",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode `moments.npy`, (2, C, H, W) of any floating type."""
        moments = _array(sample, "moments.npy")
        if moments.ndim != 4 or len(moments) != 2 or moments.dtype.kind != "f":
            raise ValueError(f"moments.npy is {moments.dtype} {moments.shape}; expected float (2, C, H, W)")
        return {"mean": moments[0], "std": moments[1]}

    def of_rows(self, rows: np.ndarray) -> Batch | None:
        """Decode moments of one shape and type."""
        moments = read_npys(rows)
        if moments is None or moments.ndim != 5 or moments.shape[1] != 2 or moments.dtype not in _FLOATS:
            return None
        return {"mean": torch.from_numpy(moments[:, 0]), "std": torch.from_numpy(moments[:, 1])}


@dataclass(frozen=True)
class Points:
    """A vector as `data`, (D,)."""

    extensions: Collection[str] = ("points.npy",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode `points.npy`, (D,) of any floating type."""
        points = _array(sample, "points.npy")
        if points.ndim != 1 or points.dtype.kind != "f":
            raise ValueError(f"points.npy is {points.dtype} {points.shape}; expected float (D,)")
        return {"data": points}

    def of_rows(self, rows: np.ndarray) -> Batch | None:
        """Decode points of one length and type."""
        points = read_npys(rows)
        if points is None or points.ndim != 2 or points.dtype not in _FLOATS:
            return None
        return {"data": torch.from_numpy(points)}


@dataclass(frozen=True)
class Trajectories:
    """The states of a flow as `states`, (K + 1, ...), at falling `times`, (K + 1,); the last are `data`."""

    times: tuple[float, ...]
    extensions: Collection[str] = ("trajectory.npy",)

    @classmethod
    def of(cls, shards: ShardSet) -> Self:
        """Return the decoder of a data set; `ValueError` where its card does not tell the times."""
        if "times" not in shards.info.get("trajectories", {}):
            raise ValueError(
                f"{shards.folder} has trajectory.npy, but its card does not say at which times (info: "
                "trajectories); copy the dataset.json that `driftmap trajectories` wrote"
            )
        return cls(tuple(shards.info["trajectories"]["times"]))

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Decode `trajectory.npy`, (K + 1, ...) of any floating type."""
        states = _array(sample, "trajectory.npy")
        if states.ndim < 2 or len(states) != len(self.times) or states.dtype.kind != "f":
            raise ValueError(
                f"trajectory.npy is {states.dtype} {states.shape}; expected float ({len(self.times)}, ...)"
            )
        return {"data": states[-1], "states": states, "times": np.array(self.times, np.float32)}

    def of_rows(self, rows: np.ndarray) -> Batch | None:
        """Decode states of one shape and type."""
        states = read_npys(rows)
        fits = states is not None and states.ndim > 2 and states.shape[1] == len(self.times)
        if states is None or not fits or states.dtype not in _FLOATS:
            return None
        stacked = torch.from_numpy(states)
        times = torch.tensor(self.times).expand(len(rows), -1)
        return {"data": stacked[:, -1], "states": stacked, "times": times}


def find_decoder(shards: ShardSet) -> Decoder:
    """Choose the decoder by the members that a data set has; pictures have the card's `channels`, or 3.

    Raises `ValueError` if the data set has no member that can be trained on.
    """
    if "moments.npy" in shards.extensions:
        return Moments()
    if "points.npy" in shards.extensions:
        return Points()
    if "trajectory.npy" in shards.extensions:
        return Trajectories.of(shards)
    if pictures := [kind for kind in PICTURES if kind in shards.extensions]:
        return Pixels(shards.info.get("channels", 3), pictures)
    more = f" and {len(shards.extensions) - 10} more" if len(shards.extensions) > 10 else ""
    raise ValueError(
        f"{shards.folder} has the members {', '.join(shards.extensions[:10])}{more}; expected moments.npy "
        f"(latents), points.npy, trajectory.npy or a picture ({', '.join(PICTURES)}). The key in a file's "
        "name ends at its first dot, and the rest is the member"
    )


def decode_batch(samples: Sequence[Sample], decoder: Decoder) -> Batch:
    """Decode samples and stack what they give, in the types that they are stored in.

    Raises `ValueError` for a sample that cannot be decoded, is not finite, or has another shape; it is
    named.
    """
    decoded = [_named(sample, decoder) for sample in samples]
    return {name: _stack([arrays[name] for arrays in decoded], samples) for name in decoded[0]}


def floats(stored: Tensor) -> Tensor:
    """Return pixels (uint8) as float32 in [-1, 1], and numbers of any floating type as float32."""
    return stored.float().div_(127.5).sub_(1) if stored.dtype == torch.uint8 else stored.float()


def with_floats(batch: Batch) -> Batch:
    """Return a batch whose pixels and numbers are what `floats` makes of them."""
    stored = (torch.uint8, torch.float16, torch.float32, torch.float64)
    return {name: floats(each) if each.dtype in stored else each for name, each in batch.items()}


def _named(sample: Sample, decode: Decoder) -> dict[str, np.ndarray]:
    try:
        return decode(sample)
    except ValueError as error:
        raise ValueError(f"{sample.name}: {error}") from error


def _stack(arrays: Sequence[np.ndarray], samples: Sequence[Sample]) -> Tensor:
    for array, sample in zip(arrays, samples, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{samples[0].name} has shape {arrays[0].shape} but {sample.name} has {array.shape}; "
                "the samples of a data set have one shape"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{sample.name}: it holds numbers that are not finite; write the sample again")
    stacked = np.stack(arrays)
    # torch knows no numbers of the other byte order.
    return torch.from_numpy(stacked.astype(stacked.dtype.newbyteorder("="), copy=False))


def _array(sample: Sample, extension: str) -> np.ndarray:
    if extension not in sample.members:
        raise ValueError(f"there is no {extension}, which other samples of the data set have")
    return read_npy(sample.members[extension])
