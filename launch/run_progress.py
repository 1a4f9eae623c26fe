"""How far a run is, read from its folder without torch: a login node answers at once.

Nothing is verified by hash here: what a checkpoint is worth is for `driftmap train` to say.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TAIL_BYTES = 1 << 16  # some lines of log.jsonl


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands by its log and its checkpoints; None where that is not known yet."""

    step: int
    steps: int | None
    images_per_s: float | None
    left_s: float | None
    loss: float | None
    saved_step: int | None
    saved_s: float | None  # since the last checkpoint was whole
    told_s: float | None  # since the last line of the log

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        return self.steps is not None and (self.saved_step or 0) >= self.steps


def progress_of(folder: Path) -> RunProgress | None:
    """Return how far the run of a folder is, or None where no run has begun there."""
    recipe, log = folder / "recipe.yaml", folder / "log.jsonl"
    if not recipe.is_file():
        return None
    settings: dict[str, Any] = yaml.safe_load(recipe.read_text()) or {}
    steps, batch_size = settings["training"]["steps"], settings["data"]["batch_size"]
    told, now = _last(log), time.time()
    saved = _saved(folder)
    step = max(told.get("step", 0), saved[0] if saved else 0)
    rate = told.get("images_per_s")
    return RunProgress(
        step=step,
        steps=steps,
        images_per_s=rate,
        left_s=(steps - step) * batch_size / rate if rate else None,
        loss=told.get("loss"),
        saved_step=saved[0] if saved else None,
        saved_s=now - saved[1] if saved else None,
        told_s=now - log.stat().st_mtime if told else None,
    )


def _saved(folder: Path) -> tuple[int, float] | None:
    """Return the step of the newest checkpoint and when its manifest was written."""
    found = sorted((folder / "checkpoints").glob("step-????????/manifest.json"))
    return (int(found[-1].parent.name.removeprefix("step-")), found[-1].stat().st_mtime) if found else None


def _last(log: Path) -> dict[str, Any]:
    """Return the last whole line of a log; a run that is being killed leaves half of one behind it."""
    if not log.is_file():
        return {}
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}
