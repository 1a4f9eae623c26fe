"""Captions, and what a text encoder has made of them.

A caption stands in a sample's `txt`, or in a field of its `json`. Encoded, it is the member `text.npy`,
float16 (num_tokens, width): no padding is stored. The card's `info["text"]` says which encoder made it, its
width, and the most tokens that a caption may have (`max_tokens`), to which batches are padded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from .labels import TEXT
from .members import read_npy
from .reader import Sample
from .shards import ShardSet


@dataclass(frozen=True)
class CaptionPlace:
    """Where captions stand: a member `txt`, or the field of a member `json` (`json:FIELD`).

    With `optional`, a sample without one has the empty caption.
    """

    member: str
    field: str = ""
    optional: bool = False

    @classmethod
    def of(cls, shards: ShardSet, place: str | None = None, *, optional: bool = False) -> Self:
        """Return a place such as `txt` or `json:caption`; left out, the first of these two that there is.

        Raises `ValueError` where it is no place, or no sample of the data set has the member.
        """
        if place is None:
            place = "txt" if "txt" in shards.extensions else "json:caption"
        member, _, field = place.partition(":")
        if (member, bool(field)) not in (("txt", False), ("json", True)):
            raise ValueError(f"captions cannot stand in {place!r}; expected txt or json:FIELD")
        if member not in shards.extensions:
            raise ValueError(
                f"{shards.folder} has no {member} and so no captions there; it has "
                f"{', '.join(shards.extensions)}. Make the shards with captions, or name their place "
                "(txt or json:FIELD)"
            )
        return cls(member, field, optional)

    def __str__(self) -> str:
        return f"{self.member}:{self.field}" if self.field else self.member

    def read(self, sample: Sample) -> str:
        """Return the caption of a sample; an empty field is an empty caption.

        Raises `ValueError` where there is none; it names the sample.
        """
        try:
            caption = self._read(sample)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {self.member} cannot be read ({error})") from error
        if caption is None and not self.optional:
            raise ValueError(
                f"{sample.name}: there is no caption in {self}; write one, or give --captions-optional: the "
                "sample has the empty caption then"
            )
        if not isinstance(caption, str | None):
            raise ValueError(f"{sample.name}: {self} is {caption!r}; expected text")
        return caption or ""

    def _read(self, sample: Sample) -> object:
        data = sample.members.get(self.member)
        if data is None:
            return None
        if self.member == "txt":
            return data.decode().strip()
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError(f"it is {type(fields).__name__}, expected an object")
        return fields.get(self.field)


@dataclass(frozen=True)
class TextDecoder:
    """The encoded captions of a batch, padded with zeros to `max_tokens`."""

    max_tokens: int
    width: int

    @classmethod
    def of(cls, shards: ShardSet) -> Self | None:
        """Return the decoder of a data set, or nothing where it has no encoded captions.

        Raises `ValueError` where its card does not say how they were made.
        """
        if TEXT not in shards.extensions:
            return None
        text = shards.info.get("text")
        if not isinstance(text, dict) or not {"max_tokens", "width"} <= text.keys():
            raise ValueError(
                f"{shards.folder} has {TEXT}, but its card does not say of which encoder (info: text); "
                "write them with `driftmap shards encode --text-encoder`"
            )
        return cls(text["max_tokens"], text["width"])

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return `text` (B, max_tokens, width) as it is stored, and `text_mask`, bool (B, max_tokens).

        Raises `ValueError` for a sample whose text is missing, not finite or of another shape; it is named.
        """
        captions = [self._named(sample) for sample in samples]
        text = np.zeros((len(samples), self.max_tokens, self.width), np.result_type(*captions))
        mask = np.zeros(text.shape[:2], bool)
        for number, tokens in enumerate(captions):
            text[number, : len(tokens)] = tokens
            mask[number, : len(tokens)] = True
        return {"text": torch.from_numpy(text), "text_mask": torch.from_numpy(mask)}

    def read(self, sample: Sample) -> np.ndarray:
        """Return the tokens of one sample (num_tokens, width)."""
        if TEXT not in sample.members:
            raise ValueError(f"there is no {TEXT}, which other samples of the data set have")
        tokens = read_npy(sample.members[TEXT])
        fits = tokens.ndim == 2 and tokens.shape[1] == self.width and len(tokens) <= self.max_tokens
        if not fits or tokens.dtype.kind != "f":
            raise ValueError(
                f"{TEXT} is {tokens.dtype} {tokens.shape}; the card says float (up to {self.max_tokens}, "
                f"{self.width}). Encode the captions again"
            )
        if not np.isfinite(tokens).all():
            raise ValueError(f"{TEXT} holds numbers that are not finite; encode the caption again")
        return tokens

    def _named(self, sample: Sample) -> np.ndarray:
        try:
            return self.read(sample)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error
