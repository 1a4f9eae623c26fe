"""A source in two parts, one to train on and one held out, by a hash of the last part of each key.

So the drawings of one emoji, whose keys are STYLE/CODEPOINTS, are all in one part; and what is held out stays
so when others are added.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from .making import Source


def split(source: Source, share: float) -> tuple[Source, Source]:
    """Return the part to train on and the held-out part, about `share` of the samples.

    Raises `ValueError` where one of them would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"held out is {share}; expected a share between 0 and 1, such as 0.1")
    num_held_out = sum(is_held_out(key, share) for key, _ in source.samples())
    counts = {"training": source.num_samples - num_held_out, "held out": num_held_out}
    if not all(counts.values()):
        raise ValueError(
            f"a share of {share} holds out {num_held_out} of {source.num_samples} samples; give another one"
        )
    training, held_out = (
        replace(
            source,
            samples=partial(_part, source, share, held_out=part == "held out"),
            num_samples=count,
            info={**source.info, "split": {"part": part, "held_out": share}},
        )
        for part, count in counts.items()
    )
    return training, held_out


def _part(source: Source, share: float, *, held_out: bool) -> Iterator[tuple[str, Any]]:
    return ((key, draft) for key, draft in source.samples() if is_held_out(key, share) == held_out)


def is_held_out(key: str, share: float) -> bool:
    """Return whether the sample of a key is among the `share` that is held out."""
    digest = hashlib.sha256(key.rpartition("/")[2].encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
