"""What a sample is made from, a class or a caption, and what is done to either without looking inside.

A class is its label; a caption is its tokens' embeddings by a text encoder, padded to one length, with a mask
of the real ones. Either may carry the scale of the guidance that its sample is under. "Nothing", which
guidance and condition dropout need, is a label of its own, or a caption whose mask is False everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Text(NamedTuple):
    """Captions: embeddings of their tokens (B, L, D), and a mask (B, L) that is False at padding."""

    tokens: Tensor
    mask: Tensor


class Scaled(NamedTuple):
    """A condition, or none, with the scale (B,) of the guidance that each sample is under."""

    condition: Tensor | Text | None
    scale: Tensor


Condition = Tensor | Text | Scaled  # class labels (B,), int64, or captions
Nothing = int | Text  # the condition of one sample that says nothing


def no_text() -> Text:
    """Return the caption that says nothing; its empty shape goes with captions of every length and width."""
    return Text(torch.zeros(()), torch.zeros((), dtype=torch.bool))


def padded(captions: Sequence[Tensor]) -> Text:
    """Return captions, each by its own tokens (L, D), as one batch."""
    lengths = torch.tensor([len(tokens) for tokens in captions])
    tokens = pad_sequence(list(captions), batch_first=True)
    return Text(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])


def parted(condition: Condition | None, scale: float | Tensor) -> tuple[Tensor | Text | None, float | Tensor]:
    """Return a condition alone, and the scale of guidance that it carries; `scale` if it carries none."""
    return (condition.condition, condition.scale) if isinstance(condition, Scaled) else (condition, scale)


def take(condition: Condition | None, rows: Any) -> Condition | None:
    """Return the conditions at `rows`: a mask, indices or a slice."""
    if isinstance(condition, Scaled):
        return Scaled(_alone(take(condition.condition, rows)), condition.scale[rows])
    return None if condition is None else _each(lambda part: part[rows], condition)


def joined(*conditions: Condition) -> Condition:
    """Return conditions of one kind, and captions of one length, as one batch."""
    return _each(lambda *parts: torch.cat(parts), *conditions)


def silenced(condition: Condition, rows: Tensor, *, nothing: Nothing) -> Condition:
    """Return conditions (B, ...) of which those at the mask `rows` (B,) say nothing, at their scales."""
    if isinstance(condition, Scaled):
        alone = condition.condition
        said = None if alone is None else _alone(silenced(alone, rows, nothing=nothing))
        return Scaled(said, condition.scale)
    return _each(
        lambda part, null: torch.where(rows.reshape(-1, *[1] * (part.dim() - 1)), null, part),
        condition,
        nothing,
    )


def says_nothing(condition: Condition, nothing: Nothing) -> Tensor:
    """Return a mask (B,) of the conditions that are the one that says nothing."""
    alone = _alone(condition)
    if isinstance(alone, Text):
        return ~alone.mask.any(1)
    assert alone is not None
    return torch.eq(alone, torch.as_tensor(nothing, device=alone.device))


def _alone(condition: Condition | None) -> Tensor | Text | None:
    """Return a condition without a scale."""
    return parted(condition, 1.0)[0]


def _each(function: Callable[..., Tensor], *conditions: Any) -> Condition:
    """Return a function of each part of conditions of one kind."""
    kinds = {isinstance(condition, Text) for condition in conditions}
    if len(kinds) == 2:
        raise ValueError("class labels and captions do not mix; give conditions of one kind")
    return Text(*map(function, *conditions)) if kinds == {True} else function(*conditions)
