"""Reads every byte of a data set and says in words what is wrong with it."""

import mmap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .index import Index, list_tars, load_index
from .members import check_member
from .shards import ShardSet


def check_shards(folder: Path | str, *, progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every member with its checksum, decode it, and return the problems; none means all is well.

    Each problem names the shard and, where it can, the key. `progress` is called with the tars done.
    """
    folder = Path(folder)
    try:
        tars = list_tars(folder)
    except ValueError as error:
        return [str(error)]
    problems = [f"{path.name}: left by a writer that was stopped; delete it" for path in folder.glob("*.tmp")]
    try:
        ShardSet.open(folder)
    except ValueError as error:
        problems.append(str(error))
    seen: dict[str, str] = {}
    for number, tar in enumerate(tars, start=1):
        problems.extend(_problems(tar, seen))
        if progress is not None:
            progress(number)
    return list(dict.fromkeys(problems))


def _problems(tar: Path, seen: dict[str, str]) -> Iterator[str]:
    try:
        index = load_index(tar)
    except ValueError as error:
        yield str(error)
        return
    keys = [index.key(row) for row in range(len(index))]
    for key in keys:
        if (other := seen.setdefault(key, tar.name)) != tar.name:
            yield f"{tar.name}: {key}: the same key is in {other}"
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        for row, key in enumerate(keys):
            for problem in _sample_problems(index, row, memory):
                yield f"{tar.name}: {key}: {problem}"


def _sample_problems(index: Index, row: int, memory: mmap.mmap) -> Iterator[str]:
    for column, extension in enumerate(index.extensions):
        offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
        if size < 0:
            yield f"has no {extension}, which other samples of the shard have"
            continue
        data = memory[offset : offset + size]
        if zlib.crc32(data) != index.crcs[row, column]:
            yield f"{extension} has changed since it was indexed (checksum); copy the shard again"
            continue
        try:
            check_member(extension, data)
        except ValueError as error:
            yield f"{extension}: {error}"
