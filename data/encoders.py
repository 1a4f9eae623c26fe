"""What makes new members of samples: pictures to moments of latents, captions to embeddings.

Both are stored in float16. Which network does it is given as a function: nothing here knows any.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .decode import Decoder, decode_batch, floats
from .labels import TEXT
from .reader import Sample
from .text import CaptionPlace


class Encoder(Protocol):
    """Makes one new member of each sample."""

    @property
    def extension(self) -> str:
        """The member that it makes."""
        ...

    @property
    def replaces(self) -> Collection[str]:
        """The members that are left out in return."""
        ...

    def load(self, samples: Sequence[Sample]) -> Any:
        """Decode what it needs of some samples, in any thread."""
        ...

    def encode(self, loaded: Any) -> Iterable[np.ndarray]:
        """Return the array to store for each of these samples."""
        ...


@dataclass(frozen=True)
class PictureEncoder:
    """Pictures (B, C, H, W) in [-1, 1] to mean and std of their latents, each (B, c, h, w)."""

    moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    decoder: Decoder
    extension: str = "moments.npy"

    @property
    def replaces(self) -> Collection[str]:
        """The pictures."""
        return self.decoder.extensions

    def load(self, samples: Sequence[Sample]) -> Tensor:
        """Decode the pictures."""
        return decode_batch(samples, self.decoder)["data"]

    def encode(self, loaded: Tensor) -> Iterable[np.ndarray]:
        """Return the moments (2, c, h, w) of each picture."""
        mean, std = self.moments(floats(loaded))
        if not mean.shape == std.shape or mean.ndim != 4 or len(mean) != len(loaded):
            raise ValueError(
                f"the encoder gave mean {tuple(mean.shape)} and std {tuple(std.shape)} "
                f"for {len(loaded)} pictures; expected both (B, C, H, W)"
            )
        return torch.stack([mean, std], dim=1).to("cpu", torch.float16).numpy()


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions to the embeddings of their tokens, each (num_tokens, width)."""

    embeddings: Callable[[Sequence[str]], Sequence[Tensor]]
    place: CaptionPlace
    extension: str = TEXT
    replaces: Collection[str] = ()

    def load(self, samples: Sequence[Sample]) -> list[str]:
        """Read the captions."""
        return [self.place.read(sample) for sample in samples]

    def encode(self, loaded: list[str]) -> Iterable[np.ndarray]:
        """Return the embeddings of each caption."""
        return [tokens.to("cpu", torch.float16).numpy() for tokens in self.embeddings(loaded)]


@dataclass(frozen=True)
class SizedCaptionEncoder:
    """Captions and six numbers of their pictures to embeddings, for networks that are told both.

    The numbers are height and width of the original, top and left of the crop, height and width of what is
    trained on. The first four are the fields original_height, original_width, crop_top and crop_left of a
    sample's json; where they are missing, the picture is as it was, `size` (height, width).
    """

    embeddings: Callable[[Sequence[str], Sequence[Sequence[float]]], Sequence[Tensor]]
    place: CaptionPlace
    size: tuple[int, int]
    extension: str = TEXT
    replaces: Collection[str] = ()

    def load(self, samples: Sequence[Sample]) -> list[tuple[str, list[float]]]:
        """Read the captions and the numbers."""
        return [(self.place.read(sample), self._numbers(sample)) for sample in samples]

    def encode(self, loaded: list[tuple[str, list[float]]]) -> Iterable[np.ndarray]:
        """Return the embeddings of each caption."""
        captions, numbers = [caption for caption, _ in loaded], [found for _, found in loaded]
        return [tokens.to("cpu", torch.float16).numpy() for tokens in self.embeddings(captions, numbers)]

    def _numbers(self, sample: Sample) -> list[float]:
        fields = json.loads(sample.members.get("json", b"{}"))
        names = ("original_height", "original_width", "crop_top", "crop_left")
        usual = (*self.size, 0, 0)
        return [
            *(float(fields.get(name, other)) for name, other in zip(names, usual, strict=True)),
            *self.size,
        ]


@dataclass(frozen=True)
class Encoding:
    """An encoder, and what the card says of it: `about` tells it from others, `describe` is called once."""

    encoder: Encoder
    about: dict[str, Any]
    describe: Callable[[], dict[str, Any]] = dict
