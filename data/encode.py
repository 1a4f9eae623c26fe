"""Pictures to latents and captions to embeddings, once, before training, on any number of processes.

Keys, order and shards stay as they are, and so do all members but those that an encoder replaces. What is
stored of a picture is the distribution that the autoencoder gives, its mean and standard deviation, so that
training can draw a new latent from it each time.

Every process takes its share of the shards that are missing. The first one writes down beforehand what is
being made (`encoding.json`), so that shards of two encoders are never mixed, and the card when all shards are
there. A killed run leaves whole shards only; the next one makes the others, on any number of processes.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from .encoders import Encoder, Encoding
from .index import build_index, index_path, load_index
from .members import npy_bytes
from .processes import Alone, Processes
from .reader import Reader, Sample
from .shards import ShardSet, index_shards
from .writer import write_atomically, write_shard

T = TypeVar("T")

NOTE = "encoding.json"
_THREADS = 4  # read and decode ahead of the encoders
_MAX_NAMES = 100


def encode_shards(
    source: ShardSet,
    out: Path | str,
    encodings: Sequence[Encoding],
    *,
    batch_size: int = 64,
    max_bad_fraction: float = 0.0,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    reader: Callable[..., Reader] = Reader,
) -> ShardSet:
    """Encode every sample of a data set and return the data set of what was made of them.

    A complete set by the same encoders is left alone. Samples that cannot be decoded are left out, up to
    `max_bad_fraction` of all; the card tells their number and names (`info["left_out"]`). `progress` is
    called with the samples done by all, as far as this process can tell, those of an earlier run included.
    `reader` is called as `Reader` is, where samples are read otherwise.

    Raises `ValueError` if `out` holds something else, for more samples that cannot be decoded, or if an
    encoder gives numbers that float16 cannot hold; it names the sample.
    """
    out, processes = Path(out), processes or Alone()
    encoders = [encoding.encoder for encoding in encodings]
    for encoder in encoders:
        if encoder.extension in source.extensions:
            raise ValueError(
                f"{source.folder} holds {encoder.extension} already; encode what it was made from"
            )
    missing = processes.first(lambda: _begin(source, out, encodings))
    if missing:
        done = source.num_samples - sum(source.counts[shard] for shard in missing)
        share = missing[processes.rank :: processes.size]
        batches = {shard: _batches(source, shard, batch_size) for shard in share}

        def told(samples: int) -> None:
            processes.raise_if_stopped()
            if progress is not None:
                progress(min(source.num_samples, done + samples * processes.size))

        most_bad = int(max_bad_fraction * source.num_samples)
        processes.together(lambda: _encode_share(source, out, encoders, batches, most_bad, told, reader))
    return processes.first(lambda: _complete(source, out, max_bad_fraction))


def _begin(source: ShardSet, out: Path, encodings: Sequence[Encoding]) -> list[int]:
    """Note in the folder what is being made there, or check that it is the same; return what is missing."""
    about = {"encoded_from": source.fingerprint}
    for encoding in encodings:
        about |= json.loads(json.dumps(encoding.about))
    note = out / NOTE
    if note.is_file():
        found = json.loads(note.read_bytes())
    elif out.exists() and any(out.iterdir()):
        found = ShardSet.open(out).info
    else:
        out.mkdir(parents=True, exist_ok=True)
        found = {**source.info, **about}
        for encoding in encodings:
            found |= encoding.describe()
        write_atomically(note, json.dumps(found, indent=1).encode())
    if (there := _part(found, about)) != about:
        raise ValueError(f"{out} holds what was made of {there}; expected {about}. Choose another folder")
    return [shard for shard, name in enumerate(source.shards) if not (out / name).exists()]


def _part(found: Any, about: Any) -> Any:
    """Return what a card says of the things that `about` speaks of."""
    if isinstance(found, dict) and isinstance(about, dict):
        return {name: _part(found.get(name), value) for name, value in about.items()}
    return found


def _complete(source: ShardSet, out: Path, max_bad_fraction: float) -> ShardSet:
    """Write the card, unless it is there."""
    note = out / NOTE
    if note.is_file():
        info = json.loads(note.read_bytes())
        if absent := set(source.shards) - {path.name for path in out.iterdir()}:
            raise OSError(f"{out / min(absent)} was written but is not there; run the same command again")
        for left in out.glob("*.tmp"):  # of runs that were killed
            left.unlink()
        if lost := _left_out(source, out):
            names = [f"{source.shards[shard]}: {key}" for shard, keys in lost.items() for key in keys]
            info["left_out"] = {"number": len(names), "names": names[:_MAX_NAMES]}
            if len(names) > max_bad_fraction * source.num_samples:
                raise _too_bad(source, len(names), names[0])
            if "buckets" in info:
                info["buckets"] = _smaller(info["buckets"], source, lost)
        index_shards(out, info=info, licence=source.licence, source=source.source)
        note.unlink()
    return ShardSet.open(out)


def _left_out(source: ShardSet, out: Path) -> dict[int, list[str]]:
    """Return the keys of the samples that were left out, by the numbers of their shards."""
    lost = {}
    for shard, name in enumerate(source.shards):
        if not index_path(out / name).is_file():  # killed between the two
            build_index(out / name)
        made = load_index(out / name)
        if len(made) < source.counts[shard]:
            index = source.load_index(shard)
            there = {made.key(row) for row in range(len(made))}
            lost[shard] = [key for row in range(len(index)) if (key := index.key(row)) not in there]
    return lost


def _smaller(runs: list[list[int]], source: ShardSet, lost: dict[int, list[str]]) -> list[list[int]]:
    """Return the runs of samples of one size (see buckets.py) without those that were left out."""
    ends = np.cumsum([run[2] for run in runs])
    for shard, keys in lost.items():
        runs[int(np.searchsorted(ends, source.starts[shard], side="right"))][2] -= len(keys)
    return runs


def _too_bad(source: ShardSet, number: int, example: str) -> ValueError:
    return ValueError(
        f"{number} of {source.num_samples} samples cannot be encoded, such as {example}; "
        f"`driftmap shards check {source.folder}` names them. To leave them out, give --max-bad-fraction"
    )


def _encode_share(
    source: ShardSet,
    out: Path,
    encoders: Sequence[Encoder],
    batches: dict[int, list[range]],
    most_bad: int,
    told: Callable[[int], None],
    reader: Callable[..., Reader],
) -> None:
    """Write some shards, each with its index, from their batches; `told` is called with the samples done."""
    stop = threading.Event()
    load = partial(_load, reader(source, stop=stop), encoders)
    ahead = _read_ahead(chain.from_iterable(batches.values()), load)
    bad: list[str] = []
    done = 0

    def counted(shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal done
        for batch in islice(ahead, len(batches[shard])):
            if done:  # asked to stop, it raises here, where a shard may just have become whole
                told(done)
            bad.extend(batch.bad)
            if len(bad) > most_bad:
                raise _too_bad(source, len(bad), bad[-1])
            if batch.samples:
                yield from _encoded(batch, encoders)
            done += len(batch.samples) + len(batch.bad)

    with closing(ahead):
        try:
            for shard in batches:
                tar = out / source.shards[shard]
                if write_shard(tar, counted(shard)) == 0:
                    raise ValueError(f"{tar.name}: none of its samples can be encoded, such as {bad[-1]}")
                build_index(tar)
            told(done)
        finally:
            stop.set()


def _batches(source: ShardSet, shard: int, batch_size: int) -> list[range]:
    """Return the numbers of the samples of a shard, so many at a time."""
    start = source.starts[shard]
    numbers = range(start, start + source.counts[shard])
    return [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]


@dataclass(frozen=True)
class _Loaded:
    """Samples that can be encoded, what each encoder needs of them, and what is wrong with the others."""

    samples: list[Sample]
    parts: list[Any]
    bad: list[str]


def _load(reader: Reader, encoders: Sequence[Encoder], numbers: Sequence[int]) -> _Loaded:
    """Read and decode samples, one by one where some of them are bad."""

    def loaded(numbers: Sequence[int], bad: list[str]) -> _Loaded:
        samples = [reader.read(number) for number in numbers]
        return _Loaded(samples, [encoder.load(samples) for encoder in encoders] if samples else [], bad)

    try:
        return loaded(numbers, [])
    except ValueError:
        bad, good = [], []
        for number in numbers:
            try:
                loaded([number], [])
                good.append(number)
            except ValueError as error:
                bad.append(str(error))
        return loaded(good, bad)


def _read_ahead(numbers: Iterable[range], load: Callable[[range], T]) -> Generator[T, None, None]:
    """Yield what `load` makes of each, in order; threads are some ahead."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="driftmap encode")
    waiting: deque[Future[T]] = deque()
    try:
        for batch in numbers:
            waiting.append(pool.submit(load, batch))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded(batch: _Loaded, encoders: Sequence[Encoder]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members of each sample of a batch."""
    with torch.inference_mode():
        made = [list(encoder.encode(part)) for encoder, part in zip(encoders, batch.parts, strict=True)]
    replaced = {extension for encoder in encoders for extension in encoder.replaces}
    for number, sample in enumerate(batch.samples):
        members = {}
        for encoder, arrays in zip(encoders, made, strict=True):
            if not np.isfinite(arrays[number]).all():
                raise ValueError(
                    f"{sample.name}: its {encoder.extension} is not finite in {arrays[number].dtype} (up to "
                    f"{np.finfo(arrays[number].dtype).max:g}); check the encoder"
                )
            members[encoder.extension] = npy_bytes(arrays[number])
        kept = {name: data for name, data in sample.members.items() if name not in replaced}
        yield sample.key, {**members, **kept}
