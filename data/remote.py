"""Shards that lie behind an address: http://, s3://, gs://, hf://, memory://, whatever fsspec opens.

What fails, and what a server or a network breaks off, is asked for again after a delay that doubles, with
jitter, so that a thousand ranks do not return at the same instant. What was asked for is not believed before
the caller has checked it: bytes that fail the check are asked for again too.
"""

import errno
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import Callback

from .cache import StoppedError

T = TypeVar("T")

EXTRAS = {"http": "remote", "https": "remote", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_MAX_DELAY_S = 30.0
_STALLED_S = 60.0  # without a byte from an http server
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE)


class MissingError(ValueError):
    """A file that is not behind its address."""


def is_command(place: Path | str) -> bool:
    """Return whether a place is a command that prints a tar."""
    return isinstance(place, str) and place.startswith("pipe:")


def is_address(place: Path | str) -> bool:
    """Return whether a place is an address and no local path."""
    return isinstance(place, str) and "://" in place and not place.startswith(("file://", "pipe:"))


def place_of(place: Path | str) -> Path | str:
    """Return an address without a slash at its end, or a local path.

    Raises `ValueError` for a command, an address of a kind that nothing opens, or one whose slashes a path
    has eaten.
    """
    if is_command(place):
        raise ValueError(
            f"{place} is a command, whose tar can be read from its beginning only; set data.order to "
            "resampled, or give a folder or an address"
        )
    if isinstance(place, Path):
        if found := re.match(r"([a-z][a-z0-9+.-]+):/[^/]", str(place)):
            raise ValueError(
                f"{place} was an address, {found[1]}://..., before it became a Path, which drops a slash; "
                "addresses are given as text, as data.shards in a config is"
            )
        return place
    if not is_address(place):
        return Path(place.removeprefix("file://"))
    protocol = _protocol(place)
    if protocol not in fsspec.available_protocols():
        raise ValueError(
            f"nothing opens addresses of the kind {protocol}://; expected one such as http://, s3://, gs://, "
            "hf://, or a local path"
        )
    return place.rstrip("/")


def place_or_command(place: Path | str) -> Path | str:
    """Return a command as it is, or what `place_of` makes of a place."""
    return place if is_command(place) else place_of(place)


@dataclass
class Traffic:
    """What went over the network in this process, and what did not have to."""

    downloaded_bytes: int = 0
    downloads: int = 0  # shards
    range_reads: int = 0
    retries: int = 0
    cache_hits: int = 0  # samples whose shard was in the cache when they were read
    cache_misses: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def count(self, name: str, number: int = 1) -> None:
        """Add to one of the numbers, from any thread."""
        with self._lock:
            setattr(self, name, getattr(self, name) + number)


class Remote:
    """Reads files below an address, and asks again where that may help."""

    def __init__(self, address: str, *, tries: int = 8, first_delay_s: float = 0.25) -> None:
        self.address, self.tries, self.first_delay_s = address, tries, first_delay_s
        self.traffic = Traffic()
        self._system, self._root = _file_system(address, self.traffic)
        self._jitter = random.Random()  # noqa: S311 - apart from the generators that a run seeds

    def read(
        self,
        name: str,
        check: Callable[[bytes], T],
        *,
        span: tuple[int, int] | None = None,
        stop: threading.Event | None = None,
    ) -> T:
        """Return what `check` makes of a file, or of its bytes [start, end); it raises where they are bad."""
        start, end = span or (None, None)

        def attempt() -> T:
            data = self._system.cat_file(self._path(name), start=start, end=end)
            self.traffic.count("downloaded_bytes", len(data))
            return check(data)

        return self._persist(name, attempt, stop)

    def download(
        self,
        name: str,
        file: Path,
        *,
        num_bytes: int,
        check: Callable[[], None],
        stop: threading.Event | None = None,
    ) -> None:
        """Write a file of so many bytes to a local path; `check` raises where it is bad."""

        def attempt() -> None:
            try:
                self._system.get_file(self._path(name), str(file), callback=_Limit(name, num_bytes, stop))
                if (found := file.stat().st_size) != num_bytes:
                    raise ConnectionError(f"{found} bytes came instead of {num_bytes}")
                check()
            finally:
                self.traffic.count("downloaded_bytes", file.stat().st_size if file.exists() else 0)

        self._persist(name, attempt, stop)

    def _path(self, name: str) -> str:
        return f"{self._root}/{quote(name) if self.address.startswith('http') else name}"

    def _persist(self, name: str, attempt: Callable[[], T], stop: threading.Event | None) -> T:
        """Call until it succeeds, and explain in words when it does not."""
        for number in range(1, self.tries + 1):
            if stop is not None and stop.is_set():
                raise StoppedError(f"nobody waits for {name} any more")
            try:
                return attempt()
            except Exception as error:
                # What comes over the network fails in as many types as there are packages that read it.
                if is_final(error):
                    raise self._final(name, error) from error
                if number == self.tries:
                    raise self._exhausted(name, error) from error
            self.traffic.count("retries")
            longest = min(self.first_delay_s * 2 ** (number - 1), _MAX_DELAY_S)
            delay = longest * self._jitter.uniform(0.5, 1)
            time.sleep(delay) if stop is None else stop.wait(delay)
        raise AssertionError("at least one try is made")

    def _final(self, name: str, error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError):
            return MissingError(
                f"{self.address} has no {name}; check the address, and that the folder was indexed "
                "(`driftmap shards index`) before it was put there"
            )
        if isinstance(error, StoppedError) or (isinstance(error, OSError) and error.errno in LOCAL_ERRORS):
            return error
        return OSError(f"cannot read {self.address}/{name}: {_told(error)}; check that you may read it")

    def _exhausted(self, name: str, error: Exception) -> OSError:
        return OSError(
            f"{self.address}/{name} could not be read in {self.tries} tries, the last one: {_told(error)}. "
            "Check the server and, if the file itself is bad (wrong size or checksum), put it there again; "
            "then run the same command again: it goes on from its last checkpoint"
        )


def open_stream(address: str) -> BinaryIO:
    """Open a file that is read once, from its beginning to its end; nothing is asked for again."""
    system, path = _file_system(address, Traffic())
    # In blocks of no size an http file comes as a stream. Given some size, fsspec (2026.9) does not ask the
    # server for it first, and calls no error of a server a missing file.
    settings = {"block_size": 0, "size": 1} if address.startswith("http") else {}
    return system.open(path, "rb", **settings)


class _Limit(Callback):
    """Ends a download that nobody waits for, or that brings more than fits into the room reserved for it."""

    def __init__(self, name: str, num_bytes: int, stop: threading.Event | None) -> None:
        super().__init__()
        self._name, self._num_bytes, self._stop, self._received = name, num_bytes, stop, 0

    def relative_update(self, inc: int = 1) -> None:
        """Take note of a block that came."""
        self._received += inc
        if self._received > self._num_bytes:
            raise ConnectionError(f"more than {self._num_bytes} bytes came")
        if self._stop is not None and self._stop.is_set() and self._received < self._num_bytes:
            raise StoppedError(f"nobody waits for {self._name} any more")


def _protocol(address: str) -> str:
    return address.partition("://")[0].rpartition("::")[2]


def _file_system(address: str, traffic: Traffic) -> tuple[Any, str]:
    """Return what opens an address, and the path of the address in it."""
    options: dict[str, Any] = {}
    try:
        if address.startswith(("http://", "https://")):
            options = {"client_kwargs": _http_settings(traffic), "skip_instance_cache": True}
        system, root = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        protocol = _protocol(address)
        package = f"'driftmap[{EXTRAS[protocol]}]'" if protocol in EXTRAS else "the package that it names"
        raise ValueError(f"{address} cannot be opened: {error}; run `pip install {package}`") from error
    return system, root.rstrip("/")


def _http_settings(traffic: Traffic) -> dict[str, Any]:
    """Return settings of aiohttp's sessions.

    A session (aiohttp 3.14) gives up after five minutes, however well a large shard comes in; here only a
    stalled one ends. And it asks once more, silently, when a connection is dropped before the answer: a
    request that takes a second connection without being redirected is counted.
    """
    import aiohttp

    async def begin(_: object, context: Any, parameters: object) -> None:
        context.num_connections = 0

    async def connect(_: object, context: Any, parameters: object) -> None:
        context.num_connections += 1
        if context.num_connections > 1:
            traffic.count("retries")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(begin)
    trace.on_request_redirect.append(begin)
    trace.on_connection_create_start.append(connect)
    trace.on_connection_reuseconn.append(connect)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED_S, sock_read=_STALLED_S)
    return {"timeout": limits, "trace_configs": [trace]}


def is_final(error: Exception) -> bool:
    """Return whether asking again is of no use."""
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)
    return isinstance(error, FileNotFoundError | PermissionError | StoppedError | ImportError | TypeError)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
