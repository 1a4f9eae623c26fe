"""Reads every byte of a data set and says in words what is wrong with it, in a line for each bad sample.

A tar is read by its headers, as any program reads it, and by its index, as a run does; both have to agree.
Every member is compared with its checksum and decoded. What the card says of all samples (how many classes
there are, the width of encoded captions) has to be true of each.
"""

import json
import mmap
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from zlib_ng.zlib_ng import crc32

from .cached import CachedShards
from .card import CARD, describe, salvaged
from .decode import Moments
from .encode import NOTE
from .index import Index, index_path, list_tars, load_index, read_index, scan
from .labels import TEXT, json_label, known_fields, names_of
from .members import PICTURES, check_member, read_label
from .reader import Sample
from .shards import ShardSet
from .text import TextDecoder

T = TypeVar("T")

_THREADS = 4
# What was made by an encoder is of no use without what the card says of it.
ENCODED = {"moments.npy", TEXT}


@dataclass
class _Found:
    """What is wrong with a tar and, by key, with its samples; `hashes` are those of all its keys."""

    name: str
    problems: list[str] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)
    extensions: Collection[str] = ()
    packed_keys: bytes = b""
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def lines(self) -> Iterator[str]:
        """Yield a line for each problem of the tar, and for each bad sample."""
        yield from self.problems
        for key, problems in self.samples.items():
            yield f"{self.name}: {key}: {'; '.join(problems)}"


@dataclass(frozen=True)
class _Promises:
    """What the card says of every sample."""

    num_classes: int = 0
    fields: dict[str, list[str]] = field(default_factory=dict)  # of its json, and the names of its numbers
    text: TextDecoder | None = None

    def broken_by(self, sample: Sample) -> Iterator[str]:
        """Yield what is wrong with members that can be decoded."""
        label = read_label(sample.members["cls"]) if "cls" in sample.members else 0
        if self.num_classes and not 0 <= label < self.num_classes:
            yield f"cls is {label}, but {CARD} names {self.num_classes} classes, counted from 0"
        checks: list[Callable[[], object]] = []
        if "moments.npy" in sample.members:
            checks.append(lambda: Moments()(sample))
        if self.text is not None and TEXT in sample.members:
            checks.append(partial(self.text.read, sample))
        fields = json.loads(sample.members.get("json", b"{}")) if self.fields else {}
        for name in self.fields.keys() & (fields if isinstance(fields, dict) else ()):
            checks.append(partial(json_label, sample.members["json"], f"json:{name}", self.fields[name]))
        for check in checks:
            try:
                check()
            except ValueError as error:
                yield str(error)


def check_shards(folder: Path | str, *, progress: Callable[[int], None] | None = None) -> list[str]:
    """Check a local data set and return a line for each problem; none means all is well.

    A line about a sample begins with its shard and key. `progress` is called with the tars done.
    """
    folder = Path(folder)
    try:
        tars = list_tars(folder)
    except ValueError as error:
        return [str(error)]
    problems = [f"{path.name}: left by a writer that was stopped; delete it" for path in folder.glob("*.tmp")]
    shards = None
    unopened = ""
    try:
        shards = ShardSet.open(folder)
    except ValueError as error:
        unopened = str(error)
    promises = _promises(shards, problems)
    found = _all_found(tars, lambda tar: _check(tar, promises), progress)
    if shards is None:
        problems.append(_told(folder, found) or unopened)
    elif not any(tar.problems for tar in found):
        problems += _untrue(shards, ((tar.name, load_index(tar)) for tar in tars))
    return _lines(problems, found)


def check_remote(shards: ShardSet, *, progress: Callable[[int], None] | None = None) -> list[str]:
    """Check a data set behind an address as `check_shards` does; a few shards at a time are copied for it."""
    assert isinstance(shards.remote, CachedShards)
    remote = shards.remote.remote
    problems: list[str] = []
    promises = _promises(shards, problems)
    with tempfile.TemporaryDirectory(prefix="driftmap-check-") as folder:

        def check(number: int) -> _Found:
            tar = Path(folder) / shards.shards[number]
            try:
                index_path(tar).write_bytes(remote.read(index_path(tar).name, bytes))
                remote.download(tar.name, tar, num_bytes=shards.num_bytes[number], check=lambda: None)
                found = _check(tar, promises)
            except (ValueError, OSError) as error:
                found = _Found(tar.name, [str(error)])
            tar.unlink(missing_ok=True)
            found.problems = [line.replace(folder, str(shards.folder)) for line in found.problems]
            return found

        found = _all_found(range(len(shards.shards)), check, progress)
        if not any(tar.problems for tar in found):
            paths = [index_path(Path(folder) / name) for name in shards.shards]
            indices = (read_index(path, path.name, remedy="index the folder again") for path in paths)
            problems += _untrue(shards, zip(shards.shards, indices, strict=True))
    return _lines(problems, found)


def fits(index: Index, tar: Index) -> bool:
    """Return whether an index is that of a tar, given as it was just scanned, but for changed contents."""
    if (index.packed_keys, index.extensions) != (tar.packed_keys, tar.extensions):
        return False
    same = (index.crcs == tar.crcs).all(axis=1)
    pairs = [(index.offsets, tar.offsets), (index.sizes, tar.sizes)]
    pairs += [(index.labels[same], tar.labels[same]), (index.finite[same], tar.finite[same])]
    return all(np.array_equal(one, other) for one, other in pairs)


def _told(folder: Path, found: Sequence[_Found]) -> str:
    """Return what is to be done with a folder whose card cannot be made from its tars, if it is one."""
    if (folder / NOTE).is_file():
        return f"{folder / NOTE}: what makes these shards was stopped; run the same command again"
    extensions = {name for tar in found for name in tar.extensions}
    if salvaged(folder / CARD) or not extensions & ENCODED:
        return ""
    return (
        f"{folder} has no {CARD} that can be read, and only it tells how latents or texts were encoded; copy "
        "it from where these shards came from, or encode the pictures again"
    )


def _promises(shards: ShardSet | None, problems: list[str]) -> _Promises:
    if shards is None:
        return _Promises()
    text = None
    try:
        text = TextDecoder.of(shards)
    except ValueError as error:
        problems.append(str(error))
    fields = {name: names_of(shards.info, f"json:{name}") for name in known_fields(shards.info)}
    return _Promises(len(shards.info.get("classes", ())), fields, text)


def _all_found(
    tars: Sequence[T], check: Callable[[T], _Found], progress: Callable[[int], None] | None
) -> list[_Found]:
    """Check tars in several threads; most of the work lets other threads run."""
    found = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for tar in pool.map(check, tars):
            found.append(tar)
            if progress is not None:
                progress(len(found))
    return found


def _check(tar: Path, promises: _Promises) -> _Found:
    """Check one tar, by its index where that is the right one."""
    found = _Found(tar.name)
    scanned = None
    try:
        scanned = scan(tar)
    except ValueError as error:
        found.problems.append(str(error))
    index = scanned
    try:
        index = load_index(tar)
    except ValueError as error:
        if scanned is not None:
            found.problems.append(str(error))
    if index is None:
        return found
    if scanned is not None and not fits(index, scanned):
        found.problems.append(
            f"{tar.name}: its index is that of another tar of the same size; {_repair(tar.parent)}"
        )
        index = scanned
    keys = [index.key(row) for row in range(len(index))]
    found.extensions, found.packed_keys = index.extensions, index.packed_keys
    found.hashes = np.array([hash(key) for key in keys], np.int64)
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        for row, key in enumerate(keys):
            sample = Sample(key, tar.name, {})
            if problems := list(_sample_problems(index, row, sample, memory, promises)):
                found.samples[key] = problems
    return found


def _sample_problems(
    index: Index, row: int, sample: Sample, memory: mmap.mmap, promises: _Promises
) -> Iterator[str]:
    """Yield what is wrong with a sample, whose members are filled in as they are decoded."""
    present = {name for name, size in zip(index.extensions, index.sizes[row], strict=True) if size >= 0}
    # Pictures may be of several kinds, each sample having one.
    optional = PICTURES if present & set(PICTURES) else ()
    for column, extension in enumerate(index.extensions):
        offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
        if size < 0:
            if extension not in optional:
                yield f"has no {extension}, which other samples of the shard have"
            continue
        data = memory[offset : offset + size]
        if crc32(data) != index.crcs[row, column]:
            yield f"{extension} has changed since it was indexed (checksum); copy the shard again"
            continue
        try:
            check_member(extension, data)
        except ValueError as error:
            yield f"{extension}: {error}"
        else:
            sample.members[extension] = data
    yield from promises.broken_by(sample)


def _untrue(shards: ShardSet, indices: Iterable[tuple[str, Index]]) -> list[str]:
    """Return in what the card is wrong about its shards."""
    actual = describe(indices, {})
    labels = {str(label): count for label, count in shards.labels.items()}
    said = {"extensions": list(shards.extensions), "labels": labels, "fingerprint": shards.fingerprint}
    wrong = [name for name, value in said.items() if value != actual[name]]
    told = f"{shards.folder}/{CARD} is wrong about the {' and '.join(wrong)} of its shards"
    return [f"{told}; {_repair(shards.folder)}"] if wrong else []


def _lines(problems: list[str], found: list[_Found]) -> list[str]:
    """Return the lines of all, with keys that several tars hold."""
    starts = np.cumsum([0, *(len(tar.hashes) for tar in found)])

    @lru_cache(maxsize=16)
    def keys_of(tar: int) -> list[str]:
        return found[tar].packed_keys.decode("utf-8", "surrogateescape").split("\0")

    def place_of(sample: int) -> tuple[int, str]:
        tar = int(np.searchsorted(starts, sample, side="right")) - 1
        return tar, keys_of(tar)[sample - int(starts[tar])]

    _, first, number = np.unique(
        np.concatenate([tar.hashes for tar in found]), return_index=True, return_inverse=True
    )
    for sample in np.flatnonzero(first[number] != np.arange(len(number))).tolist():
        (tar, key), (other, same) = place_of(sample), place_of(int(first[number[sample]]))
        if key == same:
            found[tar].samples.setdefault(key, []).append(f"the same key is in {found[other].name}")
    lines = problems + [line for tar in found for line in tar.lines()]
    return list(dict.fromkeys(lines))


def _repair(folder: Path | str) -> str:
    return f"run `driftmap shards check {folder} --repair`"
