"""What a run tells: means over all samples since the last line, as JSONL and for TensorBoard; warnings.

A line is written wherever a run can go on from, too: no sample is left out of the log of a run that was
stopped. What is not finite is left out of the means; guard.py tells of it.
"""

import io
import json
import os
import re
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

# protobuf makes these classes when it is imported, which no type checker sees.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from .loop import Run
from .world import World

NUM_BINS = 5
BINNED_BY = {"time": "error_t", "gap": "error_gap"}  # of a sample: the start of the names of its bins
_INCIDENTS = "incidents.jsonl"
# By the name that CUDA gives: NVIDIA's data sheets of these GPUs, where they say "with sparsity" half of it.
PEAK_TFLOPS = {
    r"\bA100\b": 312.0,
    r"\bH100 PCIe\b": 756.0,  # 1,513 with sparsity
    r"\bH100 80GB HBM3\b": 989.0,  # SXM: 1,979 with sparsity
    r"\bH200$": 989.0,  # SXM: 1,979 with sparsity
    r"\bL40S\b": 362.0,  # 733 with sparsity
    r"\bRTX 4090$": 165.2,  # accumulating in fp32; 330.4 with sparsity
}


class Means:
    """Running means of losses, kept on the device: nothing waits for the accelerator before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor]) -> None:
        """Add a micro step's finite losses; `error` (B,) also by time `error_t0` ... and gap `error_gap0` ...

        Of gaps, which may be negative, the length counts; the diagonal, gap 0, is in no bin.
        """
        for name, value in losses.items():
            if name not in (*BINNED_BY, "index"):
                finite = torch.isfinite(value)
                self._accumulate(name, torch.where(finite, value, 0.0).double().sum(), finite.sum())
        for by, name in BINNED_BY.items():
            if "error" in losses and by in losses:
                self._add_binned(name, losses["error"], losses[by].abs(), skip_zero=by == "gap")

    def _add_binned(self, name: str, error: Tensor, position: Tensor, *, skip_zero: bool) -> None:
        """Add errors (B,) to the bins of their positions (B,) in [0, 1]."""
        counted = torch.isfinite(error) & ((position > 0) | (not skip_zero))
        bins = (position * NUM_BINS).long().clamp(0, NUM_BINS - 1)[counted]
        sums = torch.bincount(bins, weights=error[counted].double(), minlength=NUM_BINS)
        self._accumulate(name, sums, torch.bincount(bins, minlength=NUM_BINS))

    def _accumulate(self, name: str, total: Tensor, count: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += total
            self._counts[name] += count
        else:
            self._sums[name], self._counts[name] = total.clone(), count.clone()

    def take(self, world: World) -> dict[str, float]:
        """Return the means over all processes and begin again; what met no sample is left out."""
        names = [
            name if total.dim() == 0 else f"{name}{number}"
            for name, total in self._sums.items()
            for number in range(total.numel())
        ]
        sums = torch.cat([total.reshape(-1) for total in self._sums.values()])
        counts = torch.cat([count.reshape(-1) for count in self._counts.values()])
        sums, counts = world.total(torch.stack([sums, counts.double()])).tolist()
        self._sums, self._counts = {}, {}
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}


class Journal:
    """A hook that writes a line every `log_every` steps: losses, rates, gradient norm, waiting for data.

    Every process takes part; the first one writes, and tells of itself how long it waited, what it achieves
    and the most memory it has held (on a GPU what torch allocated, on a CPU all of the process).
    """

    def __init__(self, run: Run) -> None:
        self.file = run.folder / "log.jsonl"
        self.board: Board | None = None
        self.means = Means()
        self.flops: float | None = None  # of a sample, counted when the first line is due
        self.started = time.monotonic()
        self._mark(run)
        run.strategy.world.first(lambda: self._open(run))

    def _open(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        _end_last_line(self.file)
        self.board = Board(run.folder / "tensorboard", step=run.step)

    def _mark(self, run: Run) -> None:
        self.since, self.step = time.monotonic() - run.evaluated_s, run.step
        self.waited_s = run.batches.wait_s

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Count the losses; write them where a line is due."""
        self.means.add(losses)
        if run.strategy.stepped and (run.step % run.recipe.training.log_every == 0 or run.save_due):
            self._tell(run)

    def _tell(self, run: Run) -> None:
        elapsed = time.monotonic() - run.evaluated_s - self.since
        values: dict[str, Any] = self.means.take(run.strategy.world)
        if run.strategy.grad_norm is not None:
            values["grad_norm"] = run.strategy.grad_norm  # of the last step that changed the weights
        values |= {
            "learning_rate": run.learning_rate(run.step - 1),
            **self._rates(run, (run.step - self.step) * run.recipe.data.batch_size / elapsed),
            "data_wait_percent": 100 * (run.batches.wait_s - self.waited_s) / elapsed,
            "time_s": time.monotonic() - self.started,
            **{f"data_{name}": count for name, count in run.batches.reader_stats.items()},
        }
        self._mark(run)
        run.strategy.world.first(lambda: self._write(run, values))
        run.latest = values

    def _rates(self, run: Run, images_per_s: float) -> dict[str, float]:
        """Return samples a second, and what this process achieves and holds.

        `tflops` are those the loss needs (what is computed again does not count), `mfu_percent` is their
        share of the GPU's dense bf16 peak, whatever the precision. Source: Chowdhery et al., "PaLM", 2022,
        appendix B.
        """
        mine, device = images_per_s / run.strategy.world.size, run.strategy.world.device
        rates = {"images_per_s": images_per_s, "images_per_s_per_process": mine}
        self.flops = _flops(run) if self.flops is None else self.flops
        if self.flops:
            rates["tflops"] = mine * self.flops / 1e12
            peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            if peak is not None:
                rates["mfu_percent"] = 100 * rates["tflops"] / peak
        return {**rates, "peak_memory_bytes": _peak_memory_bytes(device)}

    def _write(self, run: Run, values: dict[str, Any]) -> None:
        line = json.dumps({"step": run.step, "samples": run.samples, **values})
        _append(self.file, f"{line}\n".encode())
        assert self.board is not None
        self.board.add(values, step=run.step)


class Board:
    """Values for TensorBoard: an event file of this process.

    TensorBoard's own writer writes in a thread, whose failure (a full disk) would not reach us.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = folder / name
        self._write(Event(file_version="brain.Event:2"))
        # What a killed process told beyond its last checkpoint is told again: TensorBoard forgets it here.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: dict[str, float], *, step: int) -> None:
        """Write the values of a step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _append(self.file, record.getvalue())


def _flops(run: Run) -> float:
    """Return the operations of a sample, or 0 where they cannot be counted: no run fails for that."""
    from .cost import flops  # it makes networks by build.py, which imports this file

    try:
        return flops(run.recipe)
    except Exception as error:
        if run.strategy.world.rank == 0:
            warn(f"the log has no tflops, as the operations of this loss cannot be counted: {error!r}")
        return 0.0


def peak_tflops(gpu: str) -> float | None:
    """Return the dense bf16 peak of a GPU in 10^12 operations a second, where its name is known."""
    return next((peak for form, peak in PEAK_TFLOPS.items() if re.search(form, gpu)), None)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _append(file: Path, data: bytes) -> None:
    """Append to a file; an OSError says what is intact and what to do."""
    try:
        with file.open("ab") as stream:
            stream.write(data)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {file}: {error.strerror}; checkpoints on disk are intact. "
            "Make room or mend the folder, then give the same command: the run goes on from the last one",
        ) from error


def write_incident(folder: Path, incident: dict[str, Any]) -> None:
    """Add a line to the incidents of a run."""
    _append(folder / _INCIDENTS, f"{json.dumps(incident)}\n".encode())


def incidents(folder: Path) -> list[dict[str, Any]]:
    """Return the incidents of a run so far."""
    _end_last_line(folder / _INCIDENTS)
    file = folder / _INCIDENTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def warn(text: str) -> None:
    """Tell a person on stderr what is not right but does not stop the work."""
    Console(stderr=True).print(
        f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def _end_last_line(file: Path) -> None:
    """Cut a half-written last line, left by a killed process."""
    if file.exists():
        text = file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with file.open("r+b") as stream:
                stream.truncate(whole)
