"""Hooks: callables `(run, losses)`, called in order after every micro step; each decides if it is due."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor

from .loop import Hook, Run
from .progress import progress
from .target import follow


def update_ema(run: Run, losses: dict[str, Tensor]) -> None:
    """Move the means of the weights, and the target network, after each step that changed the weights."""
    if run.strategy.stepped and run.strategy.applied:
        run.ema.update()
        follow(run)


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Yield a list that grows by SIGINT or SIGTERM instead of what these signals would do.

    A second signal interrupts at once, also where a shell started the run with signals ignored. Outside the
    main thread, where Python allows no handlers, signals do what they did before.
    """
    received: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_at_signals(run: Run) -> Iterator[Hook]:
    """Yield a hook that ends the run after the step in which a signal to stop came to any process."""
    with signals_received() as run.signals:

        def agree(run: Run, losses: dict[str, Tensor]) -> None:
            if run.strategy.stepped:
                run.stop_asked = run.strategy.world.any(bool(run.signals))

        yield agree


@contextmanager
def show_progress(run: Run) -> Iterator[Hook]:
    """Yield a hook that shows the steps, their rate and the last logged loss, on the first process."""
    total = run.recipe.training.steps
    first = run.strategy.world.rank == 0
    with progress(run.folder.name, total, unit="steps", done=run.step, shown=first) as update:

        def show(run: Run, losses: dict[str, Tensor]) -> None:
            told = run.latest
            # A line whose losses were none of them finite has no loss.
            loss = f"loss {told['loss']:.4f}  " if "loss" in told else ""
            update(run.step, f"{loss}{told['images_per_s']:.0f} img/s" if told else "")

        yield show
