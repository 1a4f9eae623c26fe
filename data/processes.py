"""The processes that share a work: what data/ asks of them, without knowing what started them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


class Processes(Protocol):
    """The processes that share a work, as `trainer.world.World` is."""

    @property
    def rank(self) -> int:
        """The number of this one."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def first(self, function: Callable[[], T]) -> T:
        """Return on all what a function returns on the first."""
        ...

    def together(self, function: Callable[[], object]) -> None:
        """Call a function on all, and raise on all what it raises on any."""
        ...

    def raise_if_stopped(self) -> None:
        """Raise KeyboardInterrupt where any process has been asked to stop."""
        ...


@dataclass(frozen=True)
class Alone:
    """A process that shares the work with none."""

    rank: int = 0
    size: int = 1

    def first(self, function: Callable[[], T]) -> T:
        """Return what a function returns."""
        return function()

    def together(self, function: Callable[[], object]) -> None:
        """Call a function."""
        function()

    def raise_if_stopped(self) -> None:
        """Do nothing: Ctrl-C interrupts by itself."""
