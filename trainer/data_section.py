"""The section `data` of a config: which data sets, in what order, and how much of them is kept near."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from ..data.joined import join
from ..data.labels import CLASS
from ..data.order import Mixing
from ..data.remote import place_of, place_or_command
from ..data.shards import ShardSet
from ..data.stream import ShardStream
from .objective import STRICT

Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class MixedSection:
    """A data set of a mixture; of two with the weights 3 and 1, three of four samples are of the first."""

    shards: Annotated[str | Path, AfterValidator(place_of)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, config=STRICT)
class DataSection:
    """Where the samples come from. `batch_size` is the global batch of one optimizer step.

    Either `shards` or a `mixture` of several data sets is given, see data/order.py; with `balance: class` all
    classes come equally often.
    `shards` is a folder or an address such as http://host/dir; the shards of an address are kept in the
    folder `cache`, at most `cache_bytes` of them. `label` is what a model is conditioned on: `cls`,
    `json:FIELD`, a field of a sample's json whose names are in the card (emoji have `json:style`), or `text`,
    the encoded caption.
    `order` is `exact` (every sample once an epoch, by the index), or `resampled`: shards without an index,
    which may be a pattern `DIR/{000..099}.tar` or a command `pipe:...`, are drawn at random, and `card` is a
    `dataset.json` that says what lies there, if none lies beside them.
    Up to `max_bad_fraction` of the samples may be such that they cannot be used: good ones take their places,
    see data/faults.py. More stop a run, as the first one does where it is 0.
    """

    batch_size: Positive
    shards: Annotated[str | Path, AfterValidator(place_or_command)] | None = None
    mixture: tuple[MixedSection, ...] | None = None
    balance: Literal["class"] | None = None
    order: Literal["exact", "resampled"] = "exact"
    card: Annotated[str | Path, AfterValidator(place_of)] | None = None
    window: Annotated[int, Field(ge=0)] = 0  # shards shuffled together; 0: all
    label: str = CLASS
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    workers: Annotated[int, Field(ge=0)] | None = None  # decoding threads; None: as many as pay
    cache: Path | None = None  # None: $DRIFTMAP_CACHE, or a folder for temporary files
    cache_bytes: Positive | None = None  # None: $DRIFTMAP_CACHE_BYTES, or half of the free space

    def open(self) -> ShardSet:
        """Return the shard set; ValueError or OSError where it is none, not there, or has no such label."""
        if self.order == "resampled":
            assert self.shards is not None
            shards = ShardStream.of(self.shards, card=self.card)
            if len(shards.info.get("buckets", ())) > 1:
                raise ValueError(
                    f"{shards.folder} holds pictures of several sizes; only data.order exact keeps them apart"
                )
        else:
            sets = [
                ShardSet.open(each, cache=self.cache, cache_bytes=self.cache_bytes) for each in self._places
            ]
            shards = join(sets) if len(sets) > 1 else sets[0]
        return shards.labelled_by(self.label)

    @property
    def mixing(self) -> Mixing:
        """How the samples are mixed."""
        weights = tuple(part.weight for part in self.mixture or ())
        return Mixing(weights, balance=self.balance == "class")

    @property
    def _places(self) -> list[str | Path]:
        """The folders and addresses."""
        return [part.shards for part in self.mixture or ()] if self.shards is None else [self.shards]

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (self.shards is None) == (self.mixture is None):
            raise ValueError("one of shards and mixture is needed, and no more: one data set, or several")
        if self.mixture is not None and len(self.mixture) < 2:
            raise ValueError("a mixture is of two data sets or more; give a single one as shards")
        if self.order == "exact":
            for place in self._places:
                place_of(place)
            useless = ["card"] if self.card is not None else []
        else:
            names = ("window", "cache", "cache_bytes", "max_bad_fraction", "mixture", "balance")
            useless = [name for name in names if getattr(self, name)]
            useless += ["workers"] if self.workers is not None else []
        if useless:
            raise ValueError(f"{useless[0]} has no effect in the order {self.order}; remove it")
        local = all(isinstance(place, Path) for place in self._places)
        if local and not (self.cache is None and self.cache_bytes is None):
            raise ValueError("cache and cache_bytes have no effect on shards in a local folder; remove them")
        return self
