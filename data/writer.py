"""Writes shards: ordinary WebDataset tars that are whole or absent.

A sample `key` with members `{"png": ..., "cls": ...}` becomes the adjacent tar members `key.png` and
`key.cls`. WebDataset takes the key to be the path up to the first dot of its last component, so a key
itself has no dot there. The same samples give the same bytes: no time, user or host goes into a tar.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KEY = re.compile(r"(?:[^/\0]+/)*[^/.\0]+")
_EXTENSION = re.compile(r"[^/.\0A-Z][^/\0A-Z]*")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old bytes or the new ones.

    Raises `OSError` with the same number, saying what is intact and what to do.
    """
    # The name is unlike any other writer's, as two nodes may write the same file at the same time.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    except OSError as error:
        raise _explained(error, path, "what stood there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write one tar of (key, members) and return the number of samples; it is whole or absent."""
    with ShardWriter(path.parent, name=path.stem, numbered=False) as writer:
        for key, members in samples:
            writer.write(key, members)
        return writer.num_samples


class ShardWriter:
    """Writes samples into `NAME-000000.tar`, `NAME-000001.tar`, ... of one folder.

    Each tar grows under the name `*.tar.tmp` and is renamed when it is whole. An exception inside the
    `with` removes the unfinished tar; the finished ones stay. `numbered=False` writes `NAME.tar` alone.
    """

    def __init__(
        self, folder: Path, *, name: str = "shard", samples_per_shard: int = 1000, numbered: bool = True
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; a shard holds at least one sample")
        self.folder, self.name, self.numbered = Path(folder), name, numbered
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self.num_shards = 0
        self._keys: set[str] = set()
        self._open: _OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self._path()
        if first.exists():
            raise ValueError(f"{first} exists already; write into an empty folder, or delete it first")

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample.

        Raises `ValueError` for a key or member that WebDataset could not read back; it names the key.
        Raises `OSError` with the same number, saying which shards are intact.
        """
        self._check(key, members)
        try:
            if self._open is None:
                self._open = _OpenShard(self._path())
            self._open.add(key, members)
            self._keys.add(key)
            self.num_samples += 1
            if self.numbered and self._open.num_samples == self.samples_per_shard:
                self._finish()
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except OSError as failure:
            raise self._failed(failure) from failure

    def _path(self) -> Path:
        suffix = f"-{self.num_shards:06d}" if self.numbered else ""
        return self.folder / f"{self.name}{suffix}.tar"

    def _check(self, key: str, members: Mapping[str, bytes]) -> None:
        if not _KEY.fullmatch(key) or ".." in key.split("/"):
            raise ValueError(
                f"key {key!r} is no WebDataset key: it needs a relative path whose last component has no dot"
            )
        if key in self._keys:
            raise ValueError(f"key {key!r} is written twice; every sample needs its own key")
        if not members:
            raise ValueError(f"sample {key!r} has no members; it needs at least one, such as 'png'")
        for extension, data in members.items():
            if not _EXTENSION.fullmatch(extension):
                raise ValueError(
                    f"sample {key!r} has a member called {extension!r}; "
                    "a member is an extension in small letters without the leading dot, such as 'png'"
                )
            if not data:
                raise ValueError(f"sample {key!r}: member {extension!r} is empty; leave it out instead")

    def _finish(self) -> None:
        if self._open is not None:
            self._open.finish()
            self._open = None
            self.num_shards += 1

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _failed(self, error: OSError) -> OSError:
        path = self._path()
        lost = self._open.num_samples if self._open is not None else 0
        self._abandon()
        whole = (
            f"{self.num_shards} finished shards with {self.num_samples - lost} samples in {self.folder} "
            "are intact, and the unfinished one was removed"
        )
        return _explained(error, path, whole)


class _OpenShard:
    """One tar that grows under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.num_samples = 0
        self._file = open(self.temporary, "wb")  # noqa: SIM115 - it stays open between samples
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self.num_samples += 1

    def finish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _rename(self.temporary, self.path)

    def abandon(self) -> None:
        # Closing writes what is still buffered, and on a full disk that fails once more.
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder; the rename itself is atomic all the same.
        with contextlib.suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


def _explained(error: OSError, path: Path, intact: str) -> OSError:
    if error.errno in _NO_SPACE:
        remedy = "Free some space or raise the quota, then run the same command again."
    else:
        remedy = "Check that the folder exists and that you may write to it."
    return OSError(error.errno, f"cannot write {path}: {error.strerror}; {intact}. {remedy}")
