"""What a measurement had done when it was asked to stop, kept beside its result until that is there.

The file says what the numbers are of, down to the weights; numbers of anything else are never taken over. It
holds the part of each process, and any number of processes may go on: as many take a part each, or some take
several, and the same number gives the same bits as a measurement that was not stopped.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from ..data.shards import write_atomically
from .log import warn
from .signals import Stopped
from .world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Unfinished:
    """What there is of a result that is to be written to `result`; `about` decides all that is in it."""

    result: Path
    about: dict[str, Any]
    world: World

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.result.with_name(f"{self.result.name}.unfinished")

    def resumed(
        self, batches: Callable[[int], Iterator[T]], *, take: Callable[[Any], None], state: Callable[[], Any]
    ) -> Iterator[T]:
        """Yield `batches(done)` after `take` got what was kept; where stopped, `state()` is kept.

        `done` is how many samples all processes have come through together, see `Dealer`.
        """
        parts = self.read()
        for part in parts[self.world.rank :: self.world.size]:
            take(part["state"])
        try:
            yield from batches(parts[0]["done"] if parts else 0)
        except Stopped as stopped:
            self.keep({"done": stopped.done, "state": state()}, f"{stopped.done} samples")
            raise

    def read(self) -> list[Any]:
        """Return the parts of all processes that were kept, none where there are none of this."""
        if not self.world.first(self.file.is_file):
            return []
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            return found["parts"] if found["about"] == self._about else []
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            warn(f"{self.file} cannot be read ({error}); it is measured again")
            return []

    def keep(self, part: Any, done: str) -> None:
        """Write the parts of all processes and tell what they have done; every process must call."""
        parts = self.world.gathered(part)

        def write() -> None:
            stream = io.BytesIO()
            torch.save({"about": self._about, "parts": parts}, stream)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, stream.getvalue())
            told = f"stopped after {done}, which are kept in {self.file}; the same command goes on"
            Console().print(told, markup=False, highlight=False, soft_wrap=True)

        self.world.first(write)

    def forget(self) -> None:
        """Remove what was kept: the result is there."""
        self.world.first(lambda: self.file.unlink(missing_ok=True))

    @property
    def _about(self) -> str:
        return json.dumps(self.about, sort_keys=True, default=str)
