"""Buckets: the sizes that pictures of a data set have, each shard those of one.

The card lists them under `buckets` as [height, width, number of samples], in the order of the shards, so that
it says which shards hold which size. Of latents they are the sizes of the pictures that were encoded.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

Size = tuple[int, int]  # height, width


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Return the sizes of a list such as 64x64,48x80: heights and widths.

    Raises `ValueError` for text of another form, or two sizes of the same proportions.
    """
    words = text.split(",")
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word.strip()) for word in words]
    for word, match in zip(words, found, strict=True):
        if match is None:
            raise ValueError(
                f"buckets: {word!r} is no size; expected HEIGHTxWIDTH, such as 64x64,48x80,80x48"
            )
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if len({Fraction(*size) for size in sizes}) < len(sizes):
        raise ValueError(
            f"buckets: two of {text} have the same proportions, by which one is chosen; leave one out"
        )
    return sizes


def nearest(size: Size, sizes: Sequence[Size]) -> int:
    """Return which of the sizes has the proportions nearest to these, |log(h / w) - log(h' / w')|."""
    proportion = math.log(size[0] / size[1])
    return min(
        range(len(sizes)), key=lambda place: abs(math.log(sizes[place][0] / sizes[place][1]) - proportion)
    )


def buckets_of(
    runs: Sequence[Sequence[int]], counts: Sequence[int], folder: Path | str
) -> dict[Size | None, np.ndarray]:
    """Return the shards of each size; of an unknown one, None, where the card says nothing.

    Raises `ValueError` where what the card says does not go with how many samples the shards hold.
    """
    if not runs:
        return {None: np.arange(len(counts))}
    ends, shard_ends = np.cumsum([run[2] for run in runs]), np.cumsum(counts)
    if ends[-1] != shard_ends[-1]:
        raise ValueError(
            f"{folder} holds {shard_ends[-1]} samples, but the buckets of its card have {ends[-1]}; make its "
            "shards again"
        )
    # An empty shard at the end is of no size; let it be of the last one.
    places = np.minimum(np.searchsorted(ends, shard_ends - np.array(counts), side="right"), len(runs) - 1)
    if (mixed := np.flatnonzero(shard_ends > ends[places])).size:
        raise ValueError(
            f"shard {mixed[0]} of {folder} holds pictures of two buckets by its card; make its shards again, "
            "by `driftmap shards make --buckets`"
        )
    found: dict[Size | None, list[int]] = {}
    for shard, place in enumerate(places.tolist()):
        found.setdefault((int(runs[place][0]), int(runs[place][1])), []).append(shard)
    return {size: np.array(shards) for size, shards in found.items()}
