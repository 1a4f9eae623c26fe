"""Shards without an index, each read from its beginning to its end: a folder, addresses, or commands.

Places are written as the webdataset package writes them:

    shards/latents                                     the tars of a folder
    shards/latents/{000000..000099}.tar                braces count
    https://host/latents/{000000..000099}.tar          addresses; a folder there needs a `dataset.json`
    pipe:aws s3 cp s3://bucket/{000000..000099}.tar -  a command that prints a tar

What a tar does not say (the scale of latents, the names of classes) is in the `dataset.json` beside the
tars, or in another one that is named.
"""

import itertools
import json
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from webdataset.gopen import gopen, set_options
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from .index import list_tars
from .labels import CLASS, json_label, member_of
from .members import read_label
from .reader import Sample
from .remote import (
    MissingError,
    Remote,
    is_address,
    is_command,
    is_final,
    open_stream,
    place_of,
    place_or_command,
)
from .shards import CARD, ShardSet

_HEAD = 8  # samples that are looked at before a run
_MAX_EMPTY = 8  # shards in a row that gave no sample
_FIRST_DELAY_S = 0.125
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ShardStream(ShardSet):
    """A data set whose shards can only be read in turn; nobody knows how many samples it holds.

    `shards` are their addresses. The first samples, `head`, stand for all before a run: the members that they
    have, and, where no card tells more, their labels.
    """

    head: tuple[Sample, ...] = ()
    opened: Counter[str] = field(
        default_factory=lambda: Counter(shards_opened=0, shards_broken=0), compare=False
    )

    @classmethod
    def of(cls, place: Path | str, *, card: Path | str | None = None) -> Self:
        """Find the shards of a place and read the first samples; `card` replaces the one beside the shards.

        Raises `ValueError` where there are none, or the named card is missing.
        """
        place = place_or_command(place)
        described = _card_beside(place) if card is None else _read_card(card)
        urls = _urls_of(place, described)
        stream = cls(place, tuple(urls), (), (), "", info=described.get("info", {}))
        first = itertools.islice(stream.samples(itertools.cycle(urls)), _HEAD)
        head = tuple({sample.name: sample for sample in first}.values())  # of few samples, each once
        labels = described.get("labels") or Counter(
            read_label(sample.members[CLASS]) for sample in head if CLASS in sample.members
        )
        return replace(
            stream,
            head=head,
            extensions=tuple(sorted({extension for sample in head for extension in sample.members})),
            labels={int(label): count for label, count in labels.items()},
        )

    @property
    def num_samples(self) -> int:
        """Nobody knows."""
        raise ValueError(
            f"{self.folder} is read without an index, so its samples cannot be counted or read by number; "
            "run `driftmap shards index` on the folder, and give that"
        )

    @property
    def label_member(self) -> str:
        """The member that labels are read from."""
        return member_of(self.label)

    def label_of(self, sample: Sample) -> int:
        """Return the label of a sample; `ValueError` names one that has none."""
        data = sample.members.get(self.label_member)
        if data is None:
            raise ValueError(
                f"{sample.name}: there is no {self.label_member}, which other samples of the data set have"
            )
        try:
            return read_label(data) if self.label == CLASS else json_label(data, self.label, self.label_names)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error

    def samples(self, urls: Iterable[str], *, stop: threading.Event | None = None) -> Iterator[Sample]:
        """Read shard after shard; one that breaks off on its way here is left for the next one.

        Raises `ValueError` for a shard that is bad where it lies, `OSError` where none gives a sample.
        """
        stop = stop or threading.Event()
        num_empty, problem = 0, ""
        for url in urls:
            if stop.is_set() or num_empty == _MAX_EMPTY:
                break
            num_empty, problem = num_empty + 1, "it holds none"
            self.opened["shards_opened"] += 1
            try:
                with _opened(url) as stream:
                    for sample in _grouped(url, stream):
                        num_empty = 0
                        yield sample
            except Exception as error:
                # What comes over the network or from a command fails in as many types as there are programs.
                problem = _reason(error)
                if not _may_mend(url, error):
                    raise ValueError(f"{url}: {problem}") from error
                self.opened["shards_broken"] += 1
                warnings.warn(f"{url} broke off ({problem}); going on with another shard", stacklevel=2)
                stop.wait(_FIRST_DELAY_S * 2**num_empty if num_empty < _MAX_EMPTY else 0)
        if num_empty == _MAX_EMPTY:
            raise OSError(
                f"the last {_MAX_EMPTY} shards gave no sample; the last one was {url} ({problem}). Check "
                "data.shards, then run the same command again: it goes on from its last checkpoint"
            )


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    if is_command(url):
        stream: Any = gopen(url)
    else:
        stream = open_stream(url) if is_address(url) else open(place_of(url), "rb")
    try:
        yield stream
        # What follows the end of the tar: a command whose pipe is closed before it is done has failed.
        while stream.read(_BLOCK_BYTES):
            pass
    except BaseException:
        if set_options(stream, ignore_errors=True):
            stream.proc.kill()
        raise
    finally:
        stream.close()


def _grouped(url: str, stream: BinaryIO) -> Iterator[Sample]:
    """Group the members of a tar; those of a sample have to follow each other."""
    seen: set[str] = set()
    for found in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
        key = found.pop("__key__")
        if key in seen:
            raise ValueError(
                f"other samples lie between the members of {key}, and without an index they cannot be "
                "brought together: run `driftmap shards index` and set data.order to exact, or sort the files"
            )
        seen.add(key)
        yield Sample(key, url, {name: data for name, data in found.items() if not name.startswith("__")})


def _may_mend(url: str, error: Exception) -> bool:
    """Return whether another shard, or this one later, may be read."""
    return (is_command(url) or is_address(url)) and not isinstance(error, ValueError) and not is_final(error)


def _reason(error: Exception) -> str:
    """Return what an error says, without the streams and addresses that webdataset (1.0) adds to it."""
    if isinstance(error, FileNotFoundError):
        return "it is not there; check data.shards"
    text = next((text for text in error.args if isinstance(text, str)), str(error)).partition(" @ ")[0]
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text}; where the shard itself is bad, copy or write it again"


def _urls_of(place: Path | str, card: dict[str, Any]) -> list[str]:
    if is_command(place) or _is_pattern(place):
        try:
            return expand_urls(str(place))
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"{place} cannot be expanded ({error}); braces have to be closed, and webdataset takes "
                "${NAME} from the environment variable WDS_NAME"
            ) from error
    if isinstance(place, Path):
        return [str(tar) for tar in list_tars(place)]
    if names := [shard["name"] for shard in card.get("shards", [])]:
        return [f"{place}/{name}" for name in names]
    raise ValueError(
        f"{place} has no {CARD} that lists its shards; name them, such as {place}/{{000000..000099}}.tar"
    )


def _is_pattern(place: Path | str) -> bool:
    return "{" in str(place) or re.search(r"\.tar(\.\w+)?(\?|$)", str(place)) is not None


def _card_beside(place: Path | str) -> dict[str, Any]:
    """Read the card that lies beside shards, if there is one."""
    if isinstance(place, Path):
        card = (place.parent if _is_pattern(place) else place) / CARD
        return _read_card(card) if card.is_file() else {}
    if is_command(place):
        return {}
    folder = place.rpartition("/")[0] if _is_pattern(place) else place
    try:
        return _read_card(f"{folder}/{CARD}")
    except MissingError:
        return {}


def _read_card(place: Path | str) -> dict[str, Any]:
    place = place_of(place)
    if isinstance(place, str):
        folder, _, name = place.rpartition("/")
        return Remote(folder).read(name, json.loads)
    try:
        return json.loads(place.read_text())
    except FileNotFoundError:
        raise ValueError(f"{place} is missing; data.card is the {CARD} of a data set") from None
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error}); data.card is the {CARD} of a data set") from error
