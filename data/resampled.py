"""Batches of shards that have no index: shards are drawn with replacement, through the webdataset package.

Each rank draws shards of its own, reads them to their ends, and mixes their samples in a buffer; one thread
reads and decodes. The draw is a function of (seed, rank, position at which the stream was opened), so that a
resumed run goes on with other draws and does not see the first samples again. What the exact order (batch.py)
promises is lost, see `COST`.
"""

import hashlib
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards

from .ahead import Job, ReadAhead
from .batch import Stream
from .decode import Batch, decode_batch, find_decoder, with_floats
from .faults import first_good
from .labels import CAPTION
from .plan import rank_positions
from .reader import Sample
from .samples import Samples
from .shards import ShardSet
from .stream import ShardStream
from .text import TextDecoder

COST = (
    "data.order is resampled: shards are drawn at random and have no index. A sample may come twice before "
    "another one comes at all; a resumed run, or one on another number of processes, goes on with other "
    "samples, the same only on average; nothing notices a shard that was exchanged or cut between two files. "
    "`driftmap shards index` and data.order exact give all of this"
)
BUFFER = 1000  # samples that are mixed
_REMEMBERED = 2**16  # names of samples


class Resampled(ReadAhead):
    """An endless iterator of this rank's part of each global batch, as `Batches` is.

    `index` holds positions of the stream, which key the random numbers of a sample; here they do not tell
    which sample it is. `num_classes` is how many classes a label may be of, where that matters.
    """

    def __init__(
        self,
        shards: ShardStream,
        stream: Stream,
        *,
        num_classes: int = 0,
        start: int = 0,
        prefetch: int = 4,
    ) -> None:
        super().__init__(stream.batch_size, start=start, prefetch=prefetch)
        self._counts = shards.opened
        self._names: dict[int, str] = {}
        decoder, names, stop = find_decoder(shards), self._names, self.stopped
        wanted = {*decoder.extensions, shards.label_member}
        labels = _Labels(shards, num_classes)

        def read(sources: Iterable[dict[str, str]]) -> Iterator[Sample]:
            for sample in shards.samples((source["url"] for source in sources), stop=stop):
                members = {name: data for name, data in sample.members.items() if name in wanted}
                yield Sample(sample.key, sample.shard, members)

        def jobs() -> Generator[Job]:
            position = start
            for chosen in _batched(shards.shards, read, stream, start):
                index = rank_positions(position, stream.batch_size, rank=stream.rank, world=stream.world)
                names.update(zip(index.tolist(), (sample.name for sample in chosen), strict=True))
                for old in list(islice(names, max(0, len(names) - _REMEMBERED))):
                    del names[old]
                batch = {"index": torch.from_numpy(index), **decode_batch(chosen, decoder)}
                batch |= labels(chosen)
                yield partial(dict, batch)
                position += stream.batch_size

        self.begin(jobs)

    @property
    def reader_stats(self) -> dict[str, int]:
        """How many shards this process has opened, and how many of them broke off."""
        return dict(self._counts)

    def keys_of(self, index: torch.Tensor) -> list[str]:
        """Return the names of the samples at these stream positions, for messages about them."""
        unknown = "a sample of another process, or of long ago, at position {}"
        return [self._names.get(position, unknown.format(position)) for position in index.tolist()]


def first_batch(shards: ShardSet, count: int) -> Batch:
    """Return the first good samples as a batch, at most `count` of them, with an index or without.

    Raises `ValueError` for latents without an index whose scale nobody has told.
    """
    if not isinstance(shards, ShardStream):
        return with_floats(first_good(Samples(shards, find_decoder(shards)), count))
    decoder, samples = find_decoder(shards), shards.head[:count]
    batch = with_floats({"index": torch.arange(len(samples)), **decode_batch(samples, decoder)})
    if "mean" in batch and "latents" not in shards.info:
        raise ValueError(
            f"{shards.folder} holds latents, but no dataset.json tells their scale; set data.card to the "
            "dataset.json that `driftmap shards encode` wrote, or to a file such as "
            '{"info": {"latents": {"scaling_factor": 0.18215, "shift_factor": 0.0}}}'
        )
    return batch | _Labels(shards)(samples)


def _batched(
    shards: Sequence[str], read: Callable[..., Iterator[Sample]], stream: Stream, start: int
) -> Iterator[list[Sample]]:
    """Draw shards, mix what `read` finds there, and yield this rank's samples of batch after batch."""

    def seed(use: str) -> int:
        key = f"driftmap resampled {use} {stream.seed} {stream.rank} {start}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest())

    drawn = ResampledShards(list(shards), deterministic=True, worker_seed=lambda: seed("shards"))
    samples = iter(DataPipeline(drawn, read, shuffle(BUFFER, rng=random.Random(seed("buffer")))))
    while chosen := list(islice(samples, stream.batch_size // stream.world)):
        yield chosen


class _Labels:
    """What labels samples: `label` (B,), `text` with `text_mask`, or nothing where there is none."""

    def __init__(self, shards: ShardStream, num_classes: int = 0) -> None:
        self._shards, self._num_classes = shards, num_classes
        self._any = shards.label_member in shards.extensions
        self._text = TextDecoder.of(shards) if shards.label == CAPTION else None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return them; `ValueError` names a sample that has none, or a class that the model does not know."""
        if not self._any:
            return {}
        if self._text is not None:
            return self._text(samples)
        labels = [self._shards.label_of(sample) for sample in samples]
        for sample, label in zip(samples, labels, strict=True):
            if self._num_classes and not 0 <= label < self._num_classes:
                raise ValueError(
                    f"{sample.name} is of class {label}, but the model knows 0 to {self._num_classes - 1}; "
                    "set num_classes higher, or mend it"
                )
        return {"label": torch.tensor(labels)}
