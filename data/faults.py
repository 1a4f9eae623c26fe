"""Samples that cannot be used: what stands in their places, and which they are.

A sample is bad that cannot be read or decoded, has changed since it was indexed, has another shape than the
first good one (of its bucket, where there are several), holds numbers that are not finite, or lacks the label
that others have. In its place stands the first good one of those that a hash of (seed, position, try) draws
from the next epoch of what stands there. That is a function of the data and the seed alone, so any number of
ranks and workers, and a resumed run, have the same batches.

A shard that is gone, or that an address did not give in all tries, is not waited for again by this process:
each of its samples is bad, and counts when the stream meets it. A resumed run asks once more, for those
samples that are not in its list yet.
"""

import bisect
import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter

import numpy as np

from .buckets import Size
from .decode import Batch
from .mixture import Order
from .remote import LOCAL_ERRORS, MissingError
from .samples import Samples

MAX_TRIES = 16  # samples in a row that are found to be bad
_MAX_DRAWN = 2048  # samples in a row that are known to be bad
_DRAWN = 16  # at a time
_WHEN_MET = attrgetter("position", "sample")


@dataclass(frozen=True)
class Fault:
    """A bad sample: the first position of the stream where it would have stood, its number, and why."""

    position: int
    sample: int
    shard: str
    key: str
    reason: str

    @property
    def name(self) -> str:
        """What a message calls it, and why it is bad."""
        return f"{self.shard}: {self.key}: {self.reason}"


class Quarantine:
    """The bad samples that are known; from any thread.

    `settled` are those met before the position that the stream has come to, by number and in the order in
    which they were met. What was met further ahead is kept apart: how far that is depends on chance.
    """

    def __init__(self, settled: Iterable[Fault] = ()) -> None:
        self.settled = {fault.sample: fault for fault in settled}
        self._ahead: dict[int, Fault] = {}
        self._lock = threading.Lock()

    def __contains__(self, sample: int) -> bool:
        return sample in self.settled or sample in self._ahead

    def add(self, fault: Fault) -> None:
        """Remember a bad sample, or that one which is known was met at an earlier position."""
        with self._lock:
            if fault.sample not in self.settled:
                known = self._ahead.setdefault(fault.sample, fault)
                if fault.position < known.position:
                    self._ahead[fault.sample] = replace(known, position=fault.position)

    def take(self, position: int) -> list[Fault]:
        """Return those met before a position that the stream has come to, in order, to be settled."""
        with self._lock:
            return sorted((each for each in self._ahead.values() if each.position < position), key=_WHEN_MET)

    def settle(self, faults: Iterable[Fault]) -> list[Fault]:
        """Add those that any process has met; return the new ones, in the order in which they were met."""
        with self._lock:
            new = []
            for fault in sorted(faults, key=_WHEN_MET):
                if fault.sample not in self.settled:
                    self.settled[fault.sample] = fault
                    new.append(fault)
                self._ahead.pop(fault.sample, None)
            return new


class GoodSamples:
    """The samples at positions of a stream as batches, with good ones in the places of bad ones."""

    def __init__(self, samples: Samples, plan: Order, quarantine: Quarantine) -> None:
        self._samples, self._plan, self._quarantine = samples, plan, quarantine
        self._shards = samples.reader.shards
        self._unreadable: dict[int, str] = {}  # shards, and why
        self._sizes = {
            shard: size for size, shards in self._shards.buckets.items() for shard in shards.tolist()
        }
        self._shapes: dict[Size | None, dict[str, tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    def batch(self, numbers: np.ndarray, *, index: np.ndarray) -> Batch:
        """Return what stands at the positions `index`, where the plan has the samples `numbers`.

        Raises `ValueError` or `OSError` where one bad sample after another is drawn.
        """
        for num_tries in range(MAX_TRIES):
            chosen = self.chosen(numbers, index)
            try:
                return self._alike(chosen, index)
            except (ValueError, OSError) as error:
                last = num_tries == MAX_TRIES - 1
                if last or not _blames_data(error) or not self._look_for_bad(chosen, index):
                    raise
        raise AssertionError("the last try returns or raises")

    def chosen(self, numbers: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the samples that stand at the positions, as far as bad ones are known."""
        rows = [row for row, number in enumerate(numbers.tolist()) if self._is_bad(number)]
        if not rows:
            return numbers
        numbers = numbers.copy()
        for row in rows:
            numbers[row] = self._standing(int(numbers[row]), int(index[row]))
        return numbers

    def _standing(self, number: int, position: int) -> int:
        """Return the first sample for a position that is not known to be bad."""
        for candidate in chain([number], self._drawn(position)):
            if not self._is_bad(candidate):
                return candidate
            self._put_away(candidate, position, self._unreadable.get(self._shard(candidate), ""))
        raise ValueError(
            f"{_MAX_DRAWN} samples in a row that were drawn for position {position} of the stream are bad; "
            f"run `driftmap shards check {self._shards.folder}`"
        )

    def _drawn(self, position: int) -> Iterator[int]:
        """Yield samples that may stand at a position."""
        for block in range(_MAX_DRAWN // _DRAWN):
            key = f"driftmap substitute {self._plan.seed} {position} {block}".encode()
            draws = np.frombuffer(hashlib.shake_128(key).digest(8 * _DRAWN), np.dtype("<u8"))
            yield from self._plan.alike(position, draws).tolist()

    def _is_bad(self, number: int) -> bool:
        return number in self._quarantine or (
            bool(self._unreadable) and self._shard(number) in self._unreadable
        )

    def _look_for_bad(self, numbers: np.ndarray, index: np.ndarray) -> bool:
        """Read samples one by one; return whether some of them are bad."""
        found = False
        for number, position in zip(numbers.tolist(), index.tolist(), strict=True):
            if not self._is_bad(number):
                try:
                    self._alike(np.array([number]), np.array([position]))
                except (ValueError, OSError) as error:
                    if not _blames_data(error):
                        raise
                    if _blames_shard(error):
                        self._unreadable[self._shard(number)] = _told(error)
                    self._put_away(number, position, _told(error))
            found = found or self._is_bad(number)
        return found

    def _put_away(self, number: int, position: int, reason: str) -> None:
        shard = self._shard(number)
        name = self._shards.shards[shard]
        key = self._samples.reader.key_or_row(number)
        reason = reason.removeprefix(f"{name}: ").removeprefix(f"{key}: ")
        self._quarantine.add(Fault(position, number, name, key, reason))

    def _alike(self, numbers: np.ndarray, index: np.ndarray) -> Batch:
        """Return samples of one bucket that have the shapes of its first one."""
        expected = self._expected(self._sizes[self._shard(int(numbers[0]))])
        batch = self._samples.batch(numbers, index=index)
        for name, shape in _shapes_of(batch).items():
            if shape != expected[name]:
                raise ValueError(f"it has shape {shape}; the first good sample has {expected[name]}")
        return batch

    def _expected(self, size: Size | None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of samples of pictures of a size."""
        with self._lock:
            if size not in self._shapes:
                among = self._shards.buckets[size].tolist()
                self._shapes[size] = _shapes_of(first_good(self._samples, among=among))
            return self._shapes[size]

    def _shard(self, number: int) -> int:
        return bisect.bisect_right(self._shards.starts, number) - 1


def first_good(samples: Samples, count: int = 1, *, among: Iterable[int] | None = None) -> Batch:
    """Return the first samples that are good and alike, at most `count`, of the data set or of some shards.

    Raises what is wrong with the last one that was tried, where none of the first ones is good.
    """
    starts, counts = samples.reader.shards.starts, samples.reader.shards.counts
    good: list[int] = []
    problems: list[ValueError | OSError] = []
    for shard in range(len(counts)) if among is None else among:
        for number in range(starts[shard], starts[shard] + counts[shard]):
            if len(good) == count or len(problems) == MAX_TRIES:
                break
            chosen = np.array([*good, number])
            try:
                samples.batch(chosen, index=chosen)
            except (ValueError, OSError) as error:
                if not _blames_data(error):
                    raise
                problems.append(error)
                if _blames_shard(error):
                    break
            else:
                good.append(number)
    if not good:
        raise problems[-1] if problems else ValueError(f"{samples.reader.shards.folder} holds no sample")
    return samples.batch(np.array(good), index=np.array(good))


def _shapes_of(batch: Batch) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the samples of a batch."""
    return {name: tuple(values.shape[1:]) for name, values in batch.items()}


def _blames_data(error: ValueError | OSError) -> bool:
    """Return whether an error is about the data, and not about this machine."""
    return isinstance(error, ValueError) or error.errno not in LOCAL_ERRORS


def _blames_shard(error: ValueError | OSError) -> bool:
    return isinstance(error, OSError | MissingError)


def _told(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
