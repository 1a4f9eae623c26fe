"""What jobs print, or a run's own journal where none was submitted: the last lines, and what follows."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_S = 0.3

Files = Mapping[str, Sequence[Path]]  # of every job, by the name that its lines begin with


class Tail:
    """Whole lines of a file that grows; it need not be there yet."""

    def __init__(self, file: Path, lines: int) -> None:
        self.file = file
        self._rest = b""
        self._position = _start_of_last(file, lines)

    def new(self, *, last: bool) -> list[str]:
        """Return the lines since the last call; at the last one also a line that was never ended."""
        if not self.file.is_file():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self._position)
            found = stream.read()
        self._position += len(found)
        *lines, self._rest = (self._rest + found).split(b"\n")
        lines += [self._rest] if last and self._rest else []
        return [line.decode(errors="replace") for line in lines]


def follow(
    files: Callable[[], Files], show: Callable[[str], object], *, lines: int, ended: Callable[[], bool] | None
) -> None:
    """Show the last lines of all files; with `ended`, also what comes, until it says that nothing will.

    Files are asked for again and again: a job that waits has none yet, and one that goes on may have more.
    """
    tails: dict[Path, Tail] = {}
    while True:
        last = ended is None or ended()  # asked before reading: what was printed until then is shown
        present = files()
        for name, places in present.items():
            for file in places:
                tail = tails.setdefault(file, Tail(file, lines))
                for line in tail.new(last=last):
                    shown = _told(line) if file.suffix == ".jsonl" else line
                    show(f"{name}: {shown}" if len(present) > 1 else shown)
        if last:
            return
        time.sleep(_POLL_S)


def _told(line: str) -> str:
    """Return a line of a journal for a reader."""
    try:
        row = json.loads(line)
        loss = f"loss {row['loss']:.4f}  " if "loss" in row else ""
        return f"step {row['step']}  {loss}{row['images_per_s']:.0f} img/s"
    except (ValueError, KeyError, TypeError):
        return line


def _start_of_last(file: Path, lines: int) -> int:
    """Return where the last `lines` whole lines of a file begin."""
    if not file.is_file():
        return 0
    parts = file.read_bytes().split(b"\n")
    return sum(len(part) + 1 for part in parts[: max(0, len(parts) - 1 - lines)])
