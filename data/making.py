"""The making of a data set from a source: in parallel, and resumable to the byte.

A `Source` gives the same samples in the same order each time. What costs time, decoding and resizing, is
its `finish`, a function of one sample alone; so processes may share that work, and neither the order nor
the bytes depend on how many there are.

The set grows beside its place and is renamed when it is complete. A note in it (`making.json`) says what is
being made and with how many samples a shard; a killed run with the same note goes on at the first missing
shard, and without one everything is written anew.
"""

import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from .buckets import Size, nearest
from .pictures import size_of
from .shards import ShardSet, index_shards
from .writer import write_atomically, write_shard

Members = dict[str, bytes]
Finished = tuple[Members, str]

_NOTE = "making.json"
_CHUNK = 16  # samples that travel to a process at once
_SMALL = 2000  # below this, starting processes takes longer than they save


@dataclass(frozen=True)
class Source:
    """Samples that can be made again: `samples` starts a new pass over them.

    A pass yields `(key, members)`, or with `finish` `(key, draft)` where `finish(draft)` returns the
    members and a remark, mostly empty. `finish` runs in other processes, so it can be pickled. `buckets` are
    the sizes that its pictures get, where there are several; no shard holds two of them.
    """

    samples: Callable[[], Iterator[tuple[str, Any]]]
    num_samples: int
    info: dict[str, Any]
    licence: str = ""
    origin: str = ""
    finish: Callable[[Any], Finished] | None = None
    buckets: tuple[Size, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Members]]:
        return _finished(self, 0, workers=1)


class PictureWarning(UserWarning):
    """What was done to a picture that its owner may not expect."""


def make_shards(
    source: Source,
    out: Path | str,
    *,
    samples_per_shard: int = 1000,
    workers: int | None = 1,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Write a source as an indexed data set at `out` and return it.

    The result does not depend on `workers`, the number of processes that finish samples (None: by the size
    of the source and the CPUs), nor on interruptions. An `out` that already holds this source is left
    alone. Only one process may make a set at a time. `progress` is called with the samples written, those
    of an earlier run included.

    Raises `ValueError` if `out` holds something else.
    """
    out = Path(out)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of processes")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; a shard holds at least one sample")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder to write the data set into")
    if out.exists() and any(out.iterdir()):
        return _existing(_by_size(source), out)
    source = _by_size(source)
    sizes = _sizes_of_shards(source, samples_per_shard)
    growing = out.with_name(f".{out.name}.partial")
    shard = _claim(source, growing, samples_per_shard)
    done = sum(sizes[:shard])
    if progress is not None and done:
        progress(done)
    with closing(_finished(source, done, workers=workers or _workers_for(source))) as finished:
        samples = _counted(finished, done, progress)
        for number, size in enumerate(chain(sizes[shard:], repeat(samples_per_shard)), start=shard):
            if not write_shard(growing / f"shard-{number:06d}.tar", islice(samples, size)):
                break
    index_shards(growing, info=source.info, licence=source.licence, source=source.origin)
    os.replace(growing, out)
    (out / _NOTE).unlink()
    return ShardSet.open(out)


def _by_size(source: Source) -> Source:
    """Return a source with its pictures sorted by the size that they get, and how many get which in `info`.

    The sizes of all pictures are read first; then there is a pass over the source for each size. A source of
    pictures of one size stays as it is.
    """
    if not source.buckets:
        return source
    drafts = (draft for _, draft in source.samples())
    # What a size of pictures is read from may be wrong about the picture, so it is decided here alone.
    places = np.fromiter((nearest(size_of(draft), source.buckets) for draft in drafts), np.int32)
    counts = np.bincount(places, minlength=len(source.buckets)).tolist()
    runs = [[*size, count] for size, count in zip(source.buckets, counts, strict=True) if count]
    return replace(
        source,
        samples=partial(_sorted, source, places),
        info={**source.info, "buckets": runs},
        buckets=(),
    )


def _sorted(source: Source, places: np.ndarray) -> Iterator[tuple[str, Any]]:
    for place in np.unique(places).tolist():
        for own, (key, draft) in zip(places, source.samples(), strict=True):
            if own == place:
                yield key, replace(draft, size=source.buckets[place])


def _sizes_of_shards(source: Source, samples_per_shard: int) -> list[int]:
    """Return how many samples each shard gets; none has samples of two buckets."""
    buckets = [run[2] for run in source.info.get("buckets", ())] or [source.num_samples]
    if sum(buckets) != source.num_samples:
        raise ValueError(
            f"the source has {source.num_samples} samples, but its buckets have {sum(buckets)}; a part of it "
            "can be held out only where its pictures are made, with --buckets"
        )
    return [
        min(samples_per_shard, count - done)
        for count in buckets
        for done in range(0, count, samples_per_shard)
    ]


def _workers_for(source: Source) -> int:
    if source.finish is None or source.num_samples < _SMALL:
        return 1
    # Only Linux tells which CPUs a job may use.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cpus)


def _counted(
    samples: Iterator[tuple[str, Members]], done: int, progress: Callable[[int], None] | None
) -> Iterator[tuple[str, Members]]:
    for sample in samples:
        yield sample
        done += 1
        if progress is not None:
            progress(done)


def _finished(source: Source, start: int, *, workers: int) -> Generator[tuple[str, Members], None, None]:
    """Yield the finished samples from number `start` on, in order; of remarks, the first is a warning."""
    drafts = _distinct(source.samples())
    for _ in islice(drafts, start):
        pass
    if source.finish is None:
        yield from drafts
        return
    with closing(_in_order(source.finish, drafts, workers)) as samples:
        warned = False
        for key, (members, remark) in samples:
            if remark and not warned:
                warnings.warn(remark, PictureWarning, stacklevel=2)
                warned = True
            yield key, members


def _distinct(samples: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Refuse a key that comes twice, in whichever shards; one shard's writer sees its own alone."""
    seen: set[str] = set()
    for key, draft in samples:
        if key in seen:
            raise ValueError(f"key {key!r} is written twice; every sample needs its own key")
        seen.add(key)
        yield key, draft


def _in_order(
    finish: Callable[[Any], Finished], drafts: Iterator[tuple[str, Any]], workers: int
) -> Generator[tuple[str, Finished], None, None]:
    if workers == 1:
        for key, draft in drafts:
            yield key, finish(draft)
        return
    # Forking is not safe where torch or a progress bar has started threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[list[str], Future[list[Finished]]]] = deque()
    try:
        more = True
        while more or waiting:
            # Few chunks are under way at a time: a source may be larger than memory.
            while more and len(waiting) < 2 * workers + 2:
                chunk = list(islice(drafts, _CHUNK))
                more = len(chunk) == _CHUNK
                if chunk:
                    future = pool.submit(_finish_chunk, finish, [draft for _, draft in chunk])
                    waiting.append(([key for key, _ in chunk], future))
            if waiting:
                keys, future = waiting.popleft()
                yield from zip(keys, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that prepares samples was killed, often for want of memory; run the same command "
            "again with fewer --workers: it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish_chunk(finish: Callable[[Any], Finished], drafts: list[Any]) -> list[Finished]:
    return [finish(draft) for draft in drafts]


def _start_worker() -> None:
    """Leave signals to the parent, and end with it, however it ends."""
    # Not SIGTERM, by which the pool itself ends them. Slurm sends its signals to every process of a job.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A worker waits on a pipe that it holds open itself, so it would outlive a parent that was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _claim(source: Source, growing: Path, samples_per_shard: int) -> int:
    """Note what is being made and return the number of shards that an earlier run of the same has left."""
    about = {
        "num_samples": source.num_samples,
        "samples_per_shard": samples_per_shard,
        "info": source.info,
        "licence": source.licence,
        "source": source.origin,
    }
    note, text = growing / _NOTE, json.dumps(about, indent=1).encode() + b"\n"
    if not note.is_file() or note.read_bytes() != text:
        _discard(growing)
        growing.mkdir(parents=True)
        write_atomically(note, text)
    for left in growing.glob("*.tmp"):
        left.unlink()
    shard = 0
    while (growing / f"shard-{shard:06d}.tar").exists():
        shard += 1
    return shard


def _existing(source: Source, out: Path) -> ShardSet:
    try:
        found = ShardSet.open(out)
    except ValueError as error:
        raise ValueError(f"{out} holds something else than a complete data set ({error})") from error
    if found.info != json.loads(json.dumps(source.info)) or found.num_samples != source.num_samples:
        raise ValueError(
            f"{out} holds {found.num_samples} samples of {found.info}; expected {source.num_samples} of "
            f"{source.info}. Choose another folder, or delete this one"
        )
    (out / _NOTE).unlink(missing_ok=True)
    return found


def _discard(growing: Path) -> None:
    """Remove what a run of something else left, and nothing that it cannot have written."""
    if not growing.exists():
        return
    for file in growing.iterdir():
        if file.suffix not in (".tar", ".idx", ".json", ".tmp"):
            raise ValueError(f"{file} is in the way of the unfinished data set; move it away")
        file.unlink()
    growing.rmdir()
