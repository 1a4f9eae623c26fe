"""Means of any width when a run is over: its power means, kept over time, and the sum that is made of them.

RUN/ema/step-00001234/ holds the power means of that step as a checkpoint holds its tensors (checkpoint.py),
with the width of each mean, by its name, in state.json. Every `ema.snapshot_every` steps and at the end one
is added; none is removed but those of a past that a run went back from. Their size is 4 bytes a parameter and
width.

Source: Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024, section 3.2.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..data.shards import write_atomically
from .checkpoint import CheckpointError, verify
from .ema import Power, reconstruction, residual
from .log import warn
from .loop import Run
from .pieces import Pieces
from .recipe import MAX_WIDTH
from .saver import Saver, remove

ROUGH = 0.05  # of the profile's norm: at 0.051 the mean of a random walk was wrong by 1.5 %


class Snapshots(Saver):
    """A hook that keeps the power means of a run; it comes before the one that saves checkpoints.

    So no checkpoint is newer than a snapshot that was lost with its process, but for the one of its own
    step, and that one is written when a run goes on from there.
    """

    place = "ema"

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._forget(run)
        here = run.folder / self.place / f"step-{run.step:08d}"
        if run.step and self.due(run) and not run.strategy.world.first(here.exists):
            self.begin(run)
            self.finish(run)

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Forget what the run went back from; save where it is due."""
        if run.ema.num_updates < self._updates:
            self.finish(run)
            self._forget(run)
        self._updates = run.ema.num_updates
        super().__call__(run, losses)

    def _forget(self, run: Run) -> None:
        """Remove the snapshots of updates that are still to come, or will never be."""
        self._updates = run.ema.num_updates
        run.strategy.world.first(lambda: _remove_after(run.folder, run.ema.num_updates))

    def due(self, run: Run) -> bool:
        """Return whether a period of snapshots ends, or the run."""
        every = run.recipe.ema.snapshot_every
        return every is not None and run.ema.num_updates > 0 and (run.step % every == 0 or run.finished)

    def kinds(self, run: Run) -> list[str]:
        """Return the names of the power means."""
        return list(_widths(run))

    def state(self, run: Run) -> dict[str, Any]:
        """Return what a checkpoint says, and the width of each mean by its name."""
        return {**super().state(run), "widths": _widths(run)}

    def prune(self, run: Run) -> None:
        """Remove nothing: the older ones count, too."""


@dataclass(frozen=True)
class Snapshot:
    """The power means of a step; `widths` are theirs by name, `updates` how many each has seen."""

    folder: Path
    step: int
    updates: int
    widths: dict[str, float]


@dataclass(frozen=True)
class Mean:
    """The mean of a width at a step: whole weights by name, and how far its profile is from the wanted."""

    width: float
    step: int
    weights: dict[str, Tensor]
    residual: float
    num_means: int  # that it is the sum of

    def write(self, file: Path) -> None:
        """Write the weights as one safetensors file, with width, step and residual in its metadata."""
        told = {"width": self.width, "step": self.step, "residual": self.residual}
        data = save(self.weights, {name: str(value) for name, value in told.items()})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)


def mean_of_width(run_folder: Path, width: float, *, step: int | None = None) -> Mean:
    """Return the mean of a relative width at a snapshot's step, by default the last, from all up to it.

    Raises CheckpointError where there is no such snapshot, ValueError where the width is none.
    """
    if not 0 < width < MAX_WIDTH:
        raise ValueError(f"--width: {width} is not between 0 and {MAX_WIDTH}; 0.05 to 0.15 are usual")
    found = _until(run_folder, step)
    last = found[-1]
    means = [(one, name) for one in found for name in one.widths]
    stored = [(one.updates, one.widths[name]) for one, name in means]
    wanted = (last.updates, width)
    shares = reconstruction(stored, wanted)
    error = residual(stored, wanted, shares)
    _warn_if_rough({stored_width for _, stored_width in stored}, width, error)
    return Mean(width, last.step, _sum(means, shares), error, len(means))


def _sum(means: list[tuple[Snapshot, str]], shares: list[float]) -> dict[str, Tensor]:
    """Return the sum of means, each times its share; one of them is in memory at a time."""
    total: dict[str, Tensor] = {}
    for (one, kind), share in zip(means, shares, strict=True):
        pieces = Pieces(one.folder, kind)
        for name, shape in pieces.shapes.items():
            total.setdefault(name, torch.zeros(shape)).add_(pieces.read(name), alpha=share)
    return total


def _warn_if_rough(stored: set[float], wanted: float, error: float) -> None:
    if len(stored) == 1 and wanted not in stored:
        warn(
            f"the run kept one width only ({stored.pop()}), so the mean of width {wanted} is rough: its "
            f"profile misses by {error:.1%}; with a second one in ema.power_widths it would be near"
        )
    elif error > ROUGH:
        warn(
            f"the mean of width {wanted} is rough: its profile misses by {error:.1%}; a smaller "
            "ema.snapshot_every, or a width in ema.power_widths that is nearer, makes it better"
        )


def _until(run_folder: Path, step: int | None) -> list[Snapshot]:
    """Return the whole snapshots of a run up to the one of a step, oldest first."""
    folders = _folders(run_folder)
    steps = [_step(folder) for folder in folders]
    if not folders:
        raise CheckpointError(
            f"{run_folder} holds no snapshots of power means (no {Snapshots.place}/step-*); train with "
            "ema.power_widths, such as [0.05, 0.1], and ema.snapshot_every"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"--step: {run_folder} has no snapshot of step {step}; give one of {', '.join(map(str, steps))}"
        )
    found = []
    for folder, number in zip(folders, steps, strict=True):
        if step is not None and number > step:
            break
        snapshot = _read(folder)
        if isinstance(snapshot, Snapshot):
            found.append(snapshot)
        elif number == step:
            raise CheckpointError(f"{snapshot}; give another --step, or restore the folder from a copy")
        else:
            warn(f"left out a damaged snapshot: {snapshot}")
    if not found:
        raise CheckpointError(f"no snapshot of {run_folder} is whole; restore them from a copy")
    return found


def _read(folder: Path) -> Snapshot | str:
    """Return a snapshot, or what is wrong with it."""
    if problem := verify(folder, kinds=()):
        return problem
    state = json.loads((folder / "state.json").read_text())
    return Snapshot(folder, state["step"], state["ema_updates"], state["widths"])


def _remove_after(run_folder: Path, updates: int) -> None:
    """Remove the snapshots of later updates than these."""
    for folder in _folders(run_folder):
        try:
            seen = json.loads((folder / "state.json").read_text())["ema_updates"]
        except (OSError, ValueError):  # it is damaged, and told of when it is read
            continue
        if seen > updates:
            remove(folder)


def _folders(run_folder: Path) -> list[Path]:
    found = (run_folder / Snapshots.place).glob("step-????????")
    return sorted(folder for folder in found if folder.is_dir())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _widths(run: Run) -> dict[str, float]:
    return {name: kind.width for name, kind in run.ema.kinds.items() if isinstance(kind, Power)}
