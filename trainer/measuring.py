"""Measures of single samples, over a whole data set: the same numbers from any number of processes.

Every batch is whole on one process, and the sums over batches are added up in the order of the data set, so
that not even rounding depends on how many processes there are.
"""

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .objective import Batch
from .signals import Stopped
from .unfinished import Unfinished


@dataclass(frozen=True)
class Estimate:
    """What is known of each sample of a batch, in nats, and the evaluations of the network that it took."""

    nats: Tensor  # (B,)
    evaluations: int  # a sample
    sums: dict[str, Tensor]  # over the batch: parts of the nats, and curves


class Measure(Protocol):
    """Minus the log-likelihood of a batch, or a bound on it."""

    key: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Return what a reader must know besides the number, JSON-ready."""
        ...

    def __call__(self, batch: Batch) -> Estimate:
        """Return the estimate of each sample."""
        ...


def measure(
    measures: list[Measure],
    batches: Callable[[Container[int]], Iterable[Batch]],
    unfinished: Unfinished,
    *,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Return every measure of a data set under its key, JSON-ready; every process must call.

    `batches` gives this process's whole batches, in order, but those that begin with samples given to it;
    `about` is noted beside every number. Raises Stopped where a process was asked to stop, and keeps what all
    have done.
    """
    world = unfinished.world
    kept = [each for part in unfinished.read() for each in part]
    found: list[tuple[int, dict[str, dict[str, Tensor]]]] = kept if world.rank == 0 else []

    def here() -> None:
        for batch in batches({place for place, _ in kept}):
            sums = {one.key: _sums(one.key, one(batch), batch) for one in measures}
            found.append((int(batch.random.index[0]), sums))
            world.raise_if_stopped()

    try:
        world.together(here)
    except Stopped:
        unfinished.keep(found, f"{sum(world.gathered(len(found)))} batches")
        raise
    by_place = sorted((each for part in world.gathered(found) for each in part), key=lambda each: each[0])
    return {
        one.key: _row([sums[one.key] for _, sums in by_place]) | one.settings() | about for one in measures
    }


def _sums(key: str, estimate: Estimate, batch: Batch) -> dict[str, Tensor]:
    """Return what is added up over batches, on the CPU."""
    nats = estimate.nats.double()
    if not torch.isfinite(nats).all():
        broken = batch.random.index[~torch.isfinite(nats)].tolist()
        raise FloatingPointError(
            f"{key} is {nats[~torch.isfinite(nats)][0]} for sample {broken[0]} of the data set and for "
            f"{len(broken) - 1} others of its batch: the network gives no finite numbers there"
        )
    ones = torch.ones_like(nats)
    sums = {
        "count": ones.sum(),
        "dimensions": ones.sum() * batch.data[0].numel(),
        "evaluations": ones.sum() * estimate.evaluations,
        "nats": nats.sum(),
        "squares": nats.square().sum(),
        **estimate.sums,
    }
    return {name: value.cpu() for name, value in sums.items()}


def _row(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return value, error and parts of one measure in bits a dimension, from the sums over each batch."""
    total = {name: torch.stack([sums[name] for sums in batches]).sum(0) for name in batches[0]}
    count, dimensions = total["count"].item(), total["dimensions"].item()
    bits = dimensions * math.log(2)
    variance = (total["squares"] - total["nats"].square() / count) / max(count - 1, 1)
    row: dict[str, Any] = {
        "value": total["nats"].item() / bits,
        "standard_error": math.sqrt(max(variance.item(), 0) * count) / bits,
        "nats": total["nats"].item() / count,
        "evaluations": total["evaluations"].item() / count,
        "num_samples": int(count),
        "dimensions": int(dimensions / count),
    }
    parts = {name: total[name].item() / bits for name in ("L_N", "L_between", "L_0") if name in total}
    if parts:
        row["terms"] = parts
    if "curve" in total:
        terms, errors = total["curve"].T
        row["by_step"] = {
            "bits_per_dim": (terms / bits).tolist(),  # L_{n-1} of n = 1 .. N
            "square_error": (errors / dimensions).tolist(),  # of the data predicted from x_n
        }
    return row
