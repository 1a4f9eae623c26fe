"""A bounded folder of whole files that the processes of a node share.

Invariants, whoever is killed and when:

1. A file under its own name is whole: it grew as `NAME.BYTES.RANDOM.tmp` and was renamed. BYTES are the bytes
   set aside for it, which count from the start.
2. The files of the folder together, those that still grow included, never hold more than `max_bytes`.
3. A file that some process reads from is never removed: readers hold a shared `flock` on the file itself,
   which ends with its process.

What is removed first is the shard that was read the longest time ago; sidecars go after all shards.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER_VARIABLE = "DRIFTMAP_CACHE"
BYTES_VARIABLE = "DRIFTMAP_CACHE_BYTES"
SHARE_OF_FREE_SPACE = 0.5

_TEMPORARY = re.compile(r"(.+)\.(\d+)\.[0-9a-f]{8}\.tmp")
_POLL_S = 0.01


def folder_of_node() -> Path:
    """Return where the processes of a node keep what they share: DRIFTMAP_CACHE, or a temporary folder."""
    default = Path(tempfile.gettempdir()) / f"driftmap-cache-{os.getuid()}"
    return Path(os.environ.get(FOLDER_VARIABLE) or default)


class StoppedError(RuntimeError):
    """Whoever wanted the file does not want it any more."""


@dataclass(frozen=True)
class Cache:
    """A folder that holds at most `max_bytes`."""

    folder: Path
    max_bytes: int

    @classmethod
    def of(cls, folder: Path | None = None, max_bytes: int | None = None) -> "Cache":
        """Return the cache that a config asks for; what it leaves out is in the environment, or a default.

        The default is `driftmap-cache-USER` in the folder for temporary files, and half of the space that
        is free there or already taken by the cache.
        """
        # A folder of its own: whatever else lies where the user pointed to is neither counted nor removed.
        folder = (folder or folder_of_node()) / "driftmap-shards"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if max_bytes is None:
            text = os.environ.get(BYTES_VARIABLE)
            if text and not re.fullmatch(r"[1-9]\d*", text):
                raise ValueError(
                    f"{BYTES_VARIABLE} is {text!r}; expected a number of bytes, such as 50000000000"
                )
            taken = sum(entry.num_bytes for entry in _entries(folder))
            room = int(SHARE_OF_FREE_SPACE * (shutil.disk_usage(folder).free + taken))
            max_bytes = int(text) if text else room
        return cls(folder, max_bytes)

    @contextlib.contextmanager
    def lock(self, file: Path, stop: threading.Event | None = None) -> Iterator[None]:
        """Be the only process, and the only thread, that makes a file.

        Raises `StoppedError` when `stop` is set while waiting.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_path(file))
        while True:
            try:
                lock.acquire(timeout=0.2, poll_interval=_POLL_S)
                break
            except Timeout:
                if stop is not None and stop.is_set():
                    raise StoppedError(f"nobody waits for {file} any more") from None
        try:
            yield
        finally:
            lock.release()

    def reserve(self, file: Path, num_bytes: int, *, spare: Collection[Path] = ()) -> Path | None:
        """Make room for a file and return the temporary path to write it to, or None if there is no room.

        The caller holds the file's lock. Nothing under the folders `spare` is removed.
        """
        if num_bytes > self.max_bytes:
            return None
        with self._counting():
            entries = list(_entries(self.folder))
            used = sum(entry.num_bytes for entry in entries)
            for entry in sorted(entries, key=lambda entry: entry.rank):
                if used + num_bytes <= self.max_bytes and not entry.made_for:
                    break
                spared = not entry.made_for and any(map(entry.file.is_relative_to, spare))
                if not spared and _remove(entry, mine=file):
                    used -= entry.num_bytes
            if used + num_bytes > self.max_bytes:
                return None
            temporary = file.with_name(f"{file.name}.{num_bytes}.{secrets.token_hex(4)}.tmp")
            temporary.touch()
            return temporary

    def keep(self, temporary: Path, file: Path) -> None:
        """Give a file that is whole its own name, but not while room is counted: it would be missed."""
        with self._counting():
            temporary.replace(file)

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        return self.lock(self.folder / "reserve")

    def open(self, file: Path, num_bytes: int) -> int | None:
        """Return a descriptor of a whole file that keeps it from being removed; None if it is not here."""
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        state = os.fstat(descriptor)
        # Removed between the two calls, or cut by a crash of the whole machine.
        if state.st_nlink == 0 or state.st_size != num_bytes:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def holds(self, file: Path, num_bytes: int) -> bool:
        """Return whether a whole file is here, and count that as a use of it."""
        descriptor = self.open(file, num_bytes)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None


@dataclass(frozen=True)
class _Entry:
    """A file of the cache; `made_for` is the file that a temporary one is to become."""

    file: Path
    num_bytes: int
    used: int
    made_for: Path | None

    @property
    def rank(self) -> tuple[int, int]:
        """What goes first: what a killed process left, then shards, then sidecars; the oldest use first."""
        kind = 0 if self.made_for else 1 if self.file.suffix == ".tar" else 2
        return kind, self.used


def _entries(folder: Path) -> Iterator[_Entry]:
    for file in folder.rglob("*"):
        try:
            state = file.stat()
        except FileNotFoundError:  # another process has removed it
            continue
        if not file.is_file() or file.suffix == ".lock":
            continue
        match = _TEMPORARY.fullmatch(file.name)
        if match is None:
            yield _Entry(file, state.st_size, state.st_mtime_ns, None)
        else:
            num_bytes = max(state.st_size, int(match.group(2)))
            yield _Entry(file, num_bytes, state.st_mtime_ns, file.with_name(match.group(1)))


def _remove(entry: _Entry, *, mine: Path) -> bool:
    """Remove a file that nobody reads or writes; return whether it was removed."""
    if entry.made_for is not None:
        if entry.made_for != mine:
            lock = FileLock(_lock_path(entry.made_for))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            lock.release()
        entry.file.unlink(missing_ok=True)
        return True
    try:
        descriptor = os.open(entry.file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry.file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock_path(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")
