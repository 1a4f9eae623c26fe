"""What happens where a number is no number any more: every process agrees, tells which sample, and acts.

A step whose averaged gradient is not finite changes no weights (strategy.py). Then, by `training.non_finite`,
    raise      all processes stop with a message that names the samples
    skip       the run goes on with the next batch
    rollback   weights, moments and means go back to the last checkpoint, and the run goes on with the next
               batch: the data that led here is not seen again
An incident is a line of RUN/incidents.jsonl: step, samples with their times, norms by block. A loss that
jumps above what the last lines of the log say is told there, too, with a warning, and so is each sample that
cannot be used, where `data.max_bad_fraction` lets a run go on without it.
"""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.faults import Fault
from .checkpoint import newest, restore_weights
from .log import incidents, warn, write_incident
from .loop import Run
from .saver import Saver

MAX_IN_A_ROW = 10
MOST_SAMPLES = 8
LINES_BEFORE_A_SPIKE = 10


class Guard:
    """A hook that acts on steps that are not finite, and tells where the loss jumps."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._micro_steps: list[dict[str, Tensor]] = []
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=50)
        self._seen: dict[str, float] = {}

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Look at the step that was completed, and at the last line of the log."""
        self._micro_steps.append(losses)
        if not run.strategy.stepped:
            return
        if run.strategy.applied:
            self._in_a_row = 0
        else:
            self._act(run)
        self._micro_steps.clear()
        self._watch_for_spikes(run)

    def _act(self, run: Run) -> None:
        world, policy = run.strategy.world, run.recipe.training.non_finite
        samples = [entry for part in world.gathered(self._bad_samples(run)) for entry in part]
        if not samples and run.strategy.overflowed:
            return  # a loss of fp16 was scaled too much: it is scaled less from now on
        self._in_a_row += 1
        incident = {
            "step": run.step,
            "kind": "not finite",
            "action": policy,
            "samples": samples[:MOST_SAMPLES] or [{"key": key} for key in _keys_of_step(run)],
            "weight_norms": _norms_by_block(run, {f.name: f.value for f in run.strategy.fragments}),
            "gradient_norms": _norms_by_block(run, run.strategy.bad_gradients),
        }
        world.first(lambda: write_incident(run.folder, incident))
        self._saver.finish(run)  # what was good is not lost, and which checkpoint is the last is no chance
        if policy == "raise" or self._in_a_row > MAX_IN_A_ROW:
            raise FloatingPointError(_message(run, incident, in_a_row=self._in_a_row))
        if policy == "rollback":
            checkpoint = world.first(lambda: newest(run.folder))
            if checkpoint is None:
                raise FloatingPointError(
                    f"{_message(run, incident, in_a_row=1)}. There is no checkpoint yet to go back to"
                )
            restore_weights(run, checkpoint)
            incident["action"] = f"went back to {checkpoint.folder.name}"
        if world.rank == 0:
            warn(f"step {run.step} was not finite ({_named(incident)}): {incident['action']}")

    def _bad_samples(self, run: Run) -> list[dict[str, Any]]:
        """Return which samples of this process have errors that are not finite, with their times."""
        found = []
        for losses in self._micro_steps:
            if "error" not in losses or "index" not in losses:
                continue
            for row in (~torch.isfinite(losses["error"])).nonzero().flatten().tolist():
                index = losses["index"][row : row + 1]
                (key,) = run.batches.keys_of(index)
                entry = {"key": key, "position": int(index.item()), "rank": run.strategy.world.rank}
                if "time" in losses:
                    entry["time"] = losses["time"][row].item()
                found.append(entry)
        return found

    def _watch_for_spikes(self, run: Run) -> None:
        factor, latest = run.recipe.training.spike_factor, run.latest
        # A loss with a learned log-variance may be negative, and then has no usual size.
        name = "loss" if getattr(run.model, "log_variance", None) is None else "error"
        if factor is None or latest is self._seen or name not in latest:
            return
        self._seen, loss = latest, latest[name]
        usual = statistics.median(self._losses) if len(self._losses) >= LINES_BEFORE_A_SPIKE else math.inf
        self._losses.append(loss)
        if loss > factor * usual and run.strategy.world.rank == 0:
            incident = {"step": run.step, "kind": "spike", name: loss, f"usual_{name}": usual}
            write_incident(run.folder, incident)
            warn(f"the {name} jumped to {loss:.4g} before step {run.step}; its usual value is {usual:.4g}")


def tells_bad_samples(folder: Path, *, batch_size: int) -> Callable[[list[Fault], bool], None]:
    """Return what tells of bad samples; not of those again that a process which ended has told.

    Where the run stops, its error says it and no warning is given.
    """
    told = {line["sample"] for line in incidents(folder) if line["kind"] == "bad sample"}

    def tell(faults: list[Fault], stops: bool) -> None:
        new = [fault for fault in faults if fault.sample not in told]
        for fault in new:
            step = fault.position // batch_size + 1
            write_incident(folder, {"step": step, "kind": "bad sample", **asdict(fault)})
        if new and not stops:
            more = f", and {len(new) - 1} more" if len(new) > 1 else ""
            warn(f"a sample cannot be used, and another one takes its place: {new[0].name}{more}")

    return tell


def _keys_of_step(run: Run) -> list[str]:
    """Return the keys of the first samples of the step just done, for where no sample stands out."""
    first = run.samples - run.recipe.data.batch_size
    return run.batches.keys_of(torch.arange(first, min(run.samples, first + MOST_SAMPLES)))


def _norms_by_block(run: Run, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the norms of tensors by the block that their names begin with; every process must call."""
    squares: dict[str, float] = defaultdict(float)
    writes = {fragment.name for fragment in run.strategy.fragments if fragment.writes}
    for name, value in tensors.items():
        if name in writes:
            squares[_block(name)] += value.double().square().sum().item()
    total: dict[str, float] = defaultdict(float)
    for part in run.strategy.world.gathered(dict(squares)):
        for block, square in part.items():
            total[block] += square
    return {block: f"{math.sqrt(square):.4g}" for block, square in sorted(total.items())}


def _block(name: str) -> str:
    """Return `backbone.blocks.3` for `backbone.blocks.3.attention.qkv.bias`, else all but the last part."""
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: number + 1])
    return ".".join(parts[:-1])


def _named(incident: dict[str, Any]) -> str:
    return ", ".join(
        sample["key"] + (f" at time {sample['time']:.3f}" if "time" in sample else "")
        for sample in incident["samples"]
    )


def _message(run: Run, incident: dict[str, Any], *, in_a_row: int) -> str:
    often = f" (the {in_a_row}th step in a row)" if in_a_row > 1 else ""
    return (
        f"the gradient of step {run.step} is not finite{often}; samples: {_named(incident)}. Checkpoints on "
        f"disk are intact, {run.folder / 'incidents.jsonl'} tells more; look at these samples, lower "
        "optimizer.lr, set optimizer.clip_norm, or set training.non_finite to skip or rollback"
    )
