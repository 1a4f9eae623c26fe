"""The batches of a run: every process gets its own, or all stop.

A process that meets bad samples (data/faults.py) tells the others before any of them goes on. So all know the
same ones when a checkpoint is written, and none waits in a gradient for one that has stopped.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..data.batch import Batches
from ..data.decode import Batch
from ..data.faults import Fault, Quarantine
from ..data.resampled import Resampled
from ..data.shards import ShardSet
from ..data.stream import ShardStream
from .world import World

FEW = 10  # bad samples are no fraction yet
NAMED = 5


class AgreedBatches:
    """The batches of this process, handed out when every process has its own.

    At most `max_bad_fraction` of the samples met so far may be bad, of which so many count as met from the
    start that `FEW` may be, or all where the data set has fewer. `tell` is called with new bad samples, and
    whether the run stops, by the first process; `before_stop` by all of them before an error is raised.
    """

    def __init__(
        self,
        batches: Batches | Resampled,
        shards: ShardSet,
        world: World,
        *,
        quarantine: Quarantine,
        max_bad_fraction: float,
        tell: Callable[[list[Fault], bool], None],
    ) -> None:
        self._batches, self._shards, self._world = batches, shards, world
        self._quarantine, self._max_bad_fraction, self._tell = quarantine, max_bad_fraction, tell
        self.before_stop: Callable[[], None] = lambda: None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Hand out the next batch.

        Raises, on all processes, what making it raises on any of them, and `ValueError` where more samples
        are bad than may be.
        """
        batch, problem = {}, None
        self._world.enter("reading a batch")
        try:
            batch = next(self._batches)
        except Exception as error:
            problem = self._explained(error)
        met = self._quarantine.take(self._batches.position)
        self._world.enter("computing")
        if self._world.any(problem is not None or bool(met)):
            self._settle(met, problem)
        return batch

    def _settle(self, met: list[Fault], problem: Exception | None) -> None:
        """Exchange what every process has met; raise where the run cannot go on."""
        parts = self._world.gathered((met, problem))
        new = self._quarantine.settle([fault for found, _ in parts for fault in found])
        problems = [found for _, found in parts if found is not None]
        if new and len(self._quarantine.settled) / self._num_met > self._max_bad_fraction:
            problems.append(self._too_many())
        if new:
            self._world.first(lambda: self._tell(new, bool(problems)))
        if problems:
            self.before_stop()
            if problems[0] is not problem:
                problems[0].__cause__ = problem
            raise problems[0]

    def _explained(self, error: Exception) -> Exception:
        """Return an error about a sample with what to do, where the order has more than that to offer."""
        if type(error) is not ValueError or isinstance(self._shards, ShardStream) or self._max_bad_fraction:
            return error
        told = ValueError(
            f"{error}. `driftmap shards check {self._shards.folder}` names every such sample; to go on "
            "without them, set data.max_bad_fraction"
        )
        told.__cause__ = error
        return told

    @property
    def _num_met(self) -> int:
        few = math.ceil(FEW / self._max_bad_fraction) if self._max_bad_fraction else 0
        return min(max(self._batches.position, few), self._shards.num_samples)

    def _too_many(self) -> ValueError:
        bad = list(self._quarantine.settled.values())
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        return ValueError(
            f"{len(bad)} samples cannot be used, which is more than data.max_bad_fraction "
            f"{self._max_bad_fraction} allows of {self._num_met}: "
            f"{'; '.join(fault.name for fault in bad[:NAMED])}{more}. `driftmap shards check "
            f"{self._shards.folder}` names all; copy or write these shards again, or raise "
            "data.max_bad_fraction, then give the same command: the run goes on from its last checkpoint"
        )

    @property
    def bad(self) -> list[dict[str, Any]]:
        """The bad samples met so far, for a checkpoint."""
        return [asdict(fault) for fault in self._quarantine.settled.values()]

    @property
    def wait_s(self) -> float:
        """The time that this process has waited for batches of its own."""
        return self._batches.wait_s

    @property
    def reader_stats(self) -> dict[str, int]:
        """What went over the network, failed there or was in the cache; the bad samples, if there are any."""
        num_bad = len(self._quarantine.settled)
        return self._batches.reader_stats | ({"bad_samples": num_bad} if num_bad else {})

    def keys_of(self, index: Tensor) -> list[str]:
        """Return the keys of the samples at these stream positions, for messages about them."""
        return self._batches.keys_of(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()
