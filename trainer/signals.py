"""What asks a command to stop: a signal, or the end of its job's time. How processes agree is in world.py.

    SIGTERM, SIGUSR1, SIGUSR2   of Slurm, submitit, a launcher, a person: they all mean the same
    SIGINT                      Ctrl-C, too; pressed again a second later, it interrupts at once
    SLURM_JOB_END_TIME          a minute before it, or a tenth of a job shorter than ten minutes

A handler only remembers: the loops ask, where something is finished and can be kept. One signal often comes
twice, from the terminal or from Slurm and from a launcher in between, so only a person's second one counts.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 1.0
BEFORE_THE_END_S = 60.0
TOLD = "DRIFTMAP_TOLD"  # set in a job of Slurm, see launch/slurm.py


class ExitCode(IntEnum):
    """What a command ends with."""

    DONE = 0
    FAILED = 1  # by an exception that nobody expected
    MISTAKE = 2  # a person's, one message
    LOST = 75  # another process has ended or cannot be reached; of sysexits.h: try again
    HUNG = 124  # a process hung, and is named; as `timeout` has it
    STOPPED = 130  # asked to stop: what is finished is kept, and the same command goes on


class LostProcess(ChildProcessError):
    """Another process has ended before the work of all was done."""


def lost(error: Exception) -> bool:
    """Return whether an error says that another process has ended or cannot be reached."""
    if isinstance(error, LostProcess) or "DistError" in [kind.__name__ for kind in type(error).__mro__]:
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)  # of no class of its own


class Stopped(KeyboardInterrupt):
    """Some process was asked to stop, and all of them did, after `done` samples."""

    def __init__(self, done: int = 0) -> None:
        super().__init__(done)
        self.done = done


class StopFlag:
    """Whether this process has been asked to stop, by what it received or by the clock."""

    def __init__(self, deadline: float | None = None) -> None:
        self.received: list[int] = []
        self._deadline = deadline  # in seconds since the epoch

    def __bool__(self) -> bool:
        return bool(self.received) or (self._deadline is not None and time.time() >= self._deadline)


@contextmanager
def asked_to_stop() -> Iterator[StopFlag]:
    """Yield a flag that signals raise instead of what they would do, or the end of the job's time.

    Outside the main thread, where Python allows no handlers, signals do what they did before.
    """
    flag = StopFlag(_deadline())
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (SIGNALS if main else ())}
    first_at: list[float] = []

    def remember(number: int, frame: FrameType | None) -> None:
        flag.received.append(number)
        if number == signal.SIGINT:
            first_at.append(time.monotonic())
            if first_at[-1] - first_at[0] > SAME_REQUEST_S:
                raise KeyboardInterrupt

    for number in before:
        signal.signal(number, remember)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_at_signals() -> None:
    """Let every signal to stop do what Ctrl-C does, until `asked_to_stop` says otherwise.

    So does Ctrl-C itself, where a shell started the command with that signal ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def tell_end(code: ExitCode) -> None:
    """Tell the script of a job why this process ends: srun tells only how it ended the others then."""
    if place := os.environ.get(TOLD):
        Path(f"{place}-{os.environ.get('SLURM_PROCID', '0')}").write_text(f"{code.name}\n")


def _deadline() -> float | None:
    """Return when a job of Slurm has to stop by itself, in seconds since the epoch; None without an end."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdecimal():
        return None
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    whole = int(end) - int(start) if start.isdecimal() else 10 * BEFORE_THE_END_S
    return int(end) - min(BEFORE_THE_END_S, whole / 10)
