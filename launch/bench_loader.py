"""Our loader beside the loaders that people use: the same samples, one process, page cache warm.

Every round times each reader once, in turn, in its steady state: what a thread has read ahead between two
rounds is handed out first and not counted. A ratio is ours over a peer's in one round. Each reader has a
process, which is stopped outside its turn: threads that poll in one would slow another.

webdataset reads our very tars. The formats of the others hold the same arrays, or the same JPEG bytes, which
they decode by our function, so that the JPEG decoder decides nothing. `raw read` decodes nothing.
"""

import contextlib
import importlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..data.plan import Plan, rank_positions
from .bench_peers import JPEG, LATENTS, READERS, Setting, missing, write

ANSWER = "answer:"
RESUMES = 3  # processes of each reader that are only started
AHEAD = 8  # batches that may lie ready when a round begins
LIMIT_S, LIMIT_MIB = 0.020, 200.0  # of a resume in a plan of 10 million samples
RESUME = "time to first batch after a resume at 90 % of an epoch"
Rows = list[dict[str, Any]]


def loader(*, rounds: int, tell: Callable[[str], None] = print) -> Rows:
    """Return samples a second of ours and of each peer, then resumes (s) and memory (MiB)."""
    rows: Rows = []
    for setting in (LATENTS, JPEG):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            names = _written(setting, folder, tell)
            rows += _measured(setting, folder, names, rounds)
    return rows + _large_plan(rounds)


def _written(setting: Setting, folder: Path, tell: Callable[[str], None]) -> list[str]:
    """Write every format, and return the names of the readers that can be had here."""
    write(setting, folder, "tars")
    names: list[str] = []
    for name, (package, _) in READERS.items():
        if reason := missing(package):
            tell(f"no row `{name} {setting.name}`: {package} cannot be imported ({reason})")
            continue
        if package in ("streaming", "litdata"):
            write(setting, folder, package)
        names.append(name)
    return names


def _measured(setting: Setting, folder: Path, names: list[str], rounds: int) -> Rows:
    resumes: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for number in range(min(rounds, RESUMES)):
        for name in _rotated(names, number):
            with _Alone(setting, folder, name) as alone:
                resumes[name].append(alone.resume_s)
                memory[name].append(alone.memory_mib)
    rates: dict[str, list[float]] = {name: [] for name in (*names, "raw read")}
    with contextlib.ExitStack() as stack:
        alone = {name: stack.enter_context(_Alone(setting, folder, name)) for name in names}
        for number in range(rounds + 1):
            found = {name: alone[name].round() for name in _rotated(names, number)}
            found["raw read"] = _raw_rate(setting, folder)
            for name, rate in found.items() if number else ():  # the first round warms up
                rates[name].append(rate)
    rows = _beside_ours(rates, "{} " + setting.name, "samples/s")
    rows += _beside_ours(resumes, f"{RESUME}, {{}} {setting.name}", "s")
    return rows + _beside_ours(memory, f"memory, {{}} {setting.name}", "MiB")


def _beside_ours(values: dict[str, list[float]], name: str, unit: str) -> Rows:
    lower = unit != "samples/s"
    return [
        row(name.format(peer), values["ours"], values[peer], unit=unit, lower_is_better=lower)
        for peer in values
        if peer != "ours"
    ]


class _Alone:
    """One reader in a process of its own, stopped while it has nothing to do."""

    def __init__(self, setting: Setting, folder: Path, name: str) -> None:
        command = [sys.executable, "-m", __spec__.name, setting.name, str(folder), name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.resume_s, self.memory_mib = self._answer()

    def round(self) -> float:
        """Return the samples a second of one round."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()[0]

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._process.send_signal(signal.SIGSTOP)
                return json.loads(line.removeprefix(ANSWER))
        raise ValueError(f"the reader {self._process.args!r} ended early; what it said is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    return names[first:] + names[:first]


def _rate(setting: Setting, batches: Iterator[Any]) -> float:
    for _ in range(AHEAD):
        next(batches)
    began = time.perf_counter()
    for _ in range(setting.num_batches):
        next(batches)
    return setting.num_batches * setting.batch_size / (time.perf_counter() - began)


def _raw_rate(setting: Setting, folder: Path) -> float:
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    for tar in sorted(folder.glob("tars/*.tar")):
        with open(tar, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return setting.num_samples / (time.perf_counter() - began)


def row(
    name: str, ours: list[float], reference: list[float], *, unit: str, lower_is_better: bool
) -> dict[str, Any]:
    """Return medians, their ratio by pair, and the extremes."""
    found: dict[str, Any] = {"name": name}
    ratios = [one / other for one, other in zip(ours, reference, strict=True)]
    for key, values in (("ours", ours), ("reference", reference), ("ratio", ratios)):
        found |= {key: statistics.median(values), f"{key}_min": min(values), f"{key}_max": max(values)}
    return found | {"unit": unit, "lower_is_better": lower_is_better}


def _alone(setting: Setting, folder: Path, name: str) -> None:
    """Open one reader at 90 % of an epoch, and time a round for each line of stdin.

    Prints the seconds of the first batch and the highest memory, then the rate of each round.
    """
    package, opened = READERS[name]
    importlib.import_module(package)
    before = _memory_mib()
    began = time.perf_counter()
    reader: Any = opened(
        setting, folder, setting.num_samples * 9 // 10 // setting.batch_size * setting.batch_size
    )
    next(reader)
    resume_s = time.perf_counter() - began
    print(ANSWER, json.dumps([resume_s, _highest_mib(reader) - before]), flush=True)
    for _ in sys.stdin:
        print(ANSWER, json.dumps([_rate(setting, reader)]), flush=True)
    reader.close()


def _highest_mib(batches: Iterator[Any]) -> float:
    """Return what this process holds at most, also while its reader waits for a slow trainer."""
    found: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found.append(_memory_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    for pause_s in (*[0.0] * AHEAD, 1.0):
        batch = next(batches)
        time.sleep(pause_s)
        del batch
    done.set()
    thread.join()
    return max(found)


def _memory_mib() -> float:
    """Return what this process holds; mapped files are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def _large_plan(rounds: int) -> Rows:
    """Measure a resume at 90 % of 10 million samples in 10,000 shards, against the limits."""
    counts = (1000,) * 10_000
    start = 9_000_000

    def resume() -> None:
        Plan(counts, seed=1).at(rank_positions(start, LATENTS.batch_size, rank=0, world=1))

    seconds, mib = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        resume()
        seconds.append(time.perf_counter() - began)
        tracemalloc.start()
        resume()
        mib.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    name = "resume in a plan of 10 million samples"
    return [
        row(name, seconds, [LIMIT_S] * rounds, unit="s", lower_is_better=True),
        row(f"{name}, memory", mib, [LIMIT_MIB] * rounds, unit="MiB", lower_is_better=True),
    ]


if __name__ == "__main__":
    kind, where, chosen = sys.argv[1:]
    _alone({one.name: one for one in (LATENTS, JPEG)}[kind], Path(where), chosen)
