"""Hooks: callables `(run, losses)`, called in order after every micro step; each decides if it is due."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .loop import Hook, Run
from .progress import progress
from .signals import asked_to_stop
from .target import follow


def update_ema(run: Run, losses: dict[str, Tensor]) -> None:
    """Move the means of the weights, and the target network, after each step that changed the weights."""
    if run.strategy.stepped and run.strategy.applied:
        run.ema.update()
        follow(run)


@contextmanager
def stop_at_signals(run: Run) -> Iterator[Hook]:
    """Yield a hook that ends the run after the step in which a signal to stop came to any process."""
    with asked_to_stop() as run.strategy.world.stop:

        def agree(run: Run, losses: dict[str, Tensor]) -> None:
            if run.strategy.stepped:
                run.stop_asked = run.strategy.world.stopping()

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
