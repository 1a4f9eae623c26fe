"""Where each process of a run is, told without collectives, so that one that hangs is found and named.

A thread writes RUN/heartbeats/rank-N.json every few seconds: the step, how many stages the process has come
through (world.py), the present one and since when, and the line of code. A process that has stood in one
stage for `training.hung_after_s` looks at all of these files, twice. Hung are

    those that wrote nothing in between: stopped by a signal, starved, on a node that has died; else
    of those that stand as long and do not wait for others, the ones that have come the least far

since all run the same stages in the same order. Every process that can writes the stacks of its threads to
RUN/hung/step-NNNNNNNN/rank-N.txt and ends with ExitCode.HUNG: a thread cannot raise in a main thread that
waits in a collective.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.writer import write_atomically
from .log import warn
from .loop import Run
from .signals import ExitCode, tell_end
from .world import WAITING, World

LONGEST_BEAT_S = 10.0
BEATS = 10  # in the time after which a process counts as hung
LOOKS = 5  # beats between two looks at the others


@dataclass(frozen=True)
class Beat:
    """What a process says of itself; `beats` counts how often it has."""

    rank: int
    host: str
    beats: int
    step: int
    stages: int
    stage: str
    for_s: float
    where: str

    @classmethod
    def read(cls, file: Path) -> "Beat | None":
        """Return what a file says; None where the process has ended well and taken it away."""
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None

    def in_words(self) -> str:
        """Return who it is and where it stands."""
        return (
            f"process {self.rank} on {self.host}, at step {self.step}, {self.stage} for {self.for_s:.0f} s, "
            f"in {self.where}"
        )


def hung(before: list[Beat], after: list[Beat], longest_s: float) -> list[Beat]:
    """Return the processes that hang, by two looks at all of them with some beats in between."""
    then = {beat.rank: beat.beats for beat in before}
    silent = [beat for beat in after if then.get(beat.rank) == beat.beats]
    if silent:
        return silent
    stuck = [beat for beat in after if beat.for_s >= longest_s and beat.stage != WAITING]
    fewest = min((beat.stages for beat in stuck), default=0)
    return [beat for beat in stuck if beat.stages == fewest]


class Heartbeat:
    """The thread that writes this process's beats and, when it stands still, looks at those of all."""

    def __init__(self, folder: Path, world: World, step: Callable[[], int], longest_s: float) -> None:
        self._folder, self._world, self._step, self._longest_s = folder, world, step, longest_s
        self._every_s = min(LONGEST_BEAT_S, longest_s / BEATS)
        self._watched = threading.get_ident()
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="driftmap heartbeat", daemon=True)

    def start(self) -> None:
        """Write a first beat and go on in the thread."""
        self._beat()
        self._thread.start()

    def end(self) -> None:
        """Stop, and take away what was written."""
        self._ended.set()
        self._thread.join()
        self._file(self._world.rank).unlink(missing_ok=True)
        with suppress(OSError):  # others are still there
            self._file(0).parent.rmdir()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self._beat()
            began = self._world.stage
            if time.monotonic() - began.since < self._longest_s:
                continue
            before = self._all()
            for _ in range(LOOKS):
                if self._ended.wait(self._every_s):
                    return
                self._beat()
            found = hung(before, self._all(), self._longest_s)
            if found and self._world.stage is began:
                self._stop(found)

    def _beat(self) -> None:
        """Write where this process is."""
        self._beats += 1
        stage = self._world.stage
        beat = Beat(
            rank=self._world.rank,
            host=socket.gethostname(),
            beats=self._beats,
            step=self._step(),
            stages=stage.number,
            stage=stage.name,
            for_s=round(time.monotonic() - stage.since, 1),
            where=_line_of(self._watched),
        )
        try:
            write_atomically(self._file(beat.rank), json.dumps(asdict(beat)).encode())
        except OSError as error:
            warn(f"no heartbeat was written: {error}")

    def _all(self) -> list[Beat]:
        beats = (Beat.read(self._file(rank)) for rank in range(self._world.size))
        return [beat for beat in beats if beat is not None]

    def _file(self, rank: int) -> Path:
        return self._folder / "heartbeats" / f"rank-{rank}.json"

    def _stop(self, found: list[Beat]) -> None:
        """Write the stacks, tell who hangs, and end when the others have written theirs."""
        stacks = self._folder / "hung" / f"step-{found[0].step:08d}"
        stacks.mkdir(parents=True, exist_ok=True)
        with (stacks / f"rank-{self._world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        who = "; ".join(beat.in_words() for beat in found[:4])
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        print(
            f"error: hung: {who}{more}. The stacks of all processes that still run are in {stacks}. The same "
            "command goes on from the last checkpoint; training.hung_after_s says how long is too long",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # One that ends early makes the main threads of the others fail before they have told.
        deadline = time.monotonic() + 2 * LOOKS * self._every_s
        running = self._world.size - sum(beat.rank != self._world.rank for beat in found)
        while len(list(stacks.glob("rank-*.txt"))) < running and time.monotonic() < deadline:
            time.sleep(self._every_s / 4)
        time.sleep(self._every_s)
        tell_end(ExitCode.HUNG)
        os._exit(ExitCode.HUNG)


def _line_of(thread: int) -> str:
    """Return the line that a thread is in, and the last one of our own before it."""
    frame = sys._current_frames().get(thread)
    lines = traceback.extract_stack(frame) if frame is not None else []
    if not lines:
        return "no Python code"
    package = Path(__file__).parents[1]
    own = [line for line in lines if Path(line.filename).is_relative_to(package)]
    told = [
        f"{Path(line.filename).parent.name}/{Path(line.filename).name}:{line.lineno}" for line in own[-1:]
    ]
    last = lines[-1]
    if not own or last is not own[-1]:
        told.append(f"{last.filename}:{last.lineno}")
    return f"{' at '.join(told)} ({last.name})"


@contextmanager
def heartbeat(run: Run) -> Iterator[None]:
    """Let this process say where it is, and end it where one of the run's processes hangs."""
    longest_s, world = run.recipe.training.hung_after_s, run.strategy.world
    if longest_s is None:
        yield
        return
    world.first(lambda: _clear(run.folder / "heartbeats"))
    beating = Heartbeat(run.folder, world, lambda: run.step, longest_s)
    beating.start()
    try:
        yield
    finally:
        beating.end()


def _clear(folder: Path) -> None:
    """Make a folder for beats, without those of processes that were killed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        left.unlink()
