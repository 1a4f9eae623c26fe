"""What a run tells: means over all samples since the last line, as JSONL and for TensorBoard."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .loop import Run

NUM_TIME_BINS = 5


class Means:
    """Running means of losses, kept on the device: nothing waits for the accelerator before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor]) -> None:
        """Add a micro step's losses; `error` (B,) with `time` (B,) is also kept by time bin `error_t0` ..."""
        for name, value in losses.items():
            if name != "time":
                self._accumulate(name, value.double().sum(), torch.tensor(value.numel(), device=value.device))
        if "error" in losses and "time" in losses:
            bins = (losses["time"] * NUM_TIME_BINS).long().clamp(0, NUM_TIME_BINS - 1)
            sums = torch.bincount(bins, weights=losses["error"].double(), minlength=NUM_TIME_BINS)
            self._accumulate("error_t", sums, torch.bincount(bins, minlength=NUM_TIME_BINS))

    def _accumulate(self, name: str, total: Tensor, count: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += total
            self._counts[name] += count
        else:
            self._sums[name], self._counts[name] = total.clone(), count.clone()

    def take(self) -> dict[str, float]:
        """Return the means and begin again; what met no sample is left out."""
        values: dict[str, float] = {}
        for name, total in self._sums.items():
            means = total / self._counts[name]
            numbered = {name: means.item()} if means.dim() == 0 else _numbered(name, means)
            values |= {key: mean for key, mean in numbered.items() if not math.isnan(mean)}
        self._sums, self._counts = {}, {}
        return values


def _numbered(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}{number}": value for number, value in enumerate(values.tolist())}


class Journal:
    """A hook that writes a line every `log_every` steps: losses, rates, gradient norm, waiting for data."""

    def __init__(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self.file = run.folder / "log.jsonl"
        self.board = SummaryWriter(str(run.folder / "tensorboard"))
        self.means = Means()
        self.started = time.monotonic()
        self._mark(run)
        _end_last_line(self.file)

    def _mark(self, run: Run) -> None:
        self.since, self.step, self.waited_s = time.monotonic(), run.step, run.batches.wait_s

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Count the losses; write them where a line is due."""
        self.means.add(losses)
        if run.strategy.stepped and (run.step % run.recipe.training.log_every == 0 or run.finished):
            self._write(run)

    def _write(self, run: Run) -> None:
        elapsed = time.monotonic() - self.since
        values: dict[str, Any] = self.means.take()
        assert run.strategy.grad_norm is not None
        values |= {
            "grad_norm": run.strategy.grad_norm.item(),
            "learning_rate": run.learning_rate(run.step - 1),
            "images_per_s": (run.step - self.step) * run.recipe.data.batch_size / elapsed,
            "data_wait_percent": 100 * (run.batches.wait_s - self.waited_s) / elapsed,
            "time_s": time.monotonic() - self.started,
        }
        self._mark(run)
        if run.strategy.rank == 0:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": run.step, "samples": run.samples, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, run.step)
        run.latest = values
        if not torch.isfinite(torch.tensor([values["loss"], values["grad_norm"]])).all():
            keys = ", ".join(run.batches.keys_of(torch.arange(run.samples - 8, run.samples)))
            raise FloatingPointError(
                f"loss {values['loss']} and gradient norm {values['grad_norm']} at step {run.step} are not "
                f"finite (last samples: {keys}). Checkpoints on disk are intact; "
                "lower optimizer.lr, or set optimizer.clip_norm"
            )


def _end_last_line(file: Path) -> None:
    """Cut a half-written last line, left by a killed process."""
    if file.exists():
        text = file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with file.open("r+b") as stream:
                stream.truncate(whole)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log in order of step; after a resume the later line of a step wins."""
    lines: dict[int, dict[str, Any]] = {}
    for text in file.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            line = json.loads(text)
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]
