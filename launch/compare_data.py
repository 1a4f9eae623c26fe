"""The data of a study: points that are drawn, or shards that are there, with what is known of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batch import ordered
from ..data.decode import floats
from ..data.shards import ShardSet
from ..data.synthetic import SETS, PointSet, write_points
from ..trainer.latents import Preparation
from ..trainer.metrics.gaussian_kernel import mean_discrepancy, usual_widths
from ..trainer.objective import Batch
from ..trainer.study import SetSection
from .compare_points import grid_of, in_cells

NUM_TRAIN, NUM_TEST = 100_000, 10_000
AT_ONCE = 1000  # rows that are read
SHOWN = 3000  # points of a picture


@dataclass(frozen=True)
class DataSet:
    """A set: shards to train and to test on, all test points (N, D), their classes (N,), their density."""

    name: str
    train: ShardSet
    test: ShardSet
    points: Tensor
    labels: Tensor | None
    density: PointSet | None

    def about(self, num_samples: int, *, side: int) -> dict[str, Any]:
        """Return what the page says of it, with the floor of the discrepancy for so many samples.

        `side` is how many cells a side of the plane has whose density is drawn.
        """
        real = self.points[:num_samples]
        widths = usual_widths(real)
        fresh = self.first(min(len(real), self.train.num_samples), seed=0).data
        told: dict[str, Any] = {
            "dimensions": real.shape[1],
            "num_train": self.train.num_samples,
            "num_test": len(self.points),
            "classes": list(self.train.info.get("classes", [])),
            "floor": mean_discrepancy(fresh, real, widths),
        }
        if self.density is not None:
            nats = -self._log_density(self.points)
            told["exact"] = {"nats": nats.mean().item(), "error": (nats.std() / len(nats) ** 0.5).item()}
        if self.is_plane:
            told |= {
                "points": self.points[:SHOWN],
                "labels": self._shown_labels,
                "grid": grid_of(self.points),
            }
        if self.is_plane and self.density is not None:
            told["density"] = in_cells(self._log_density, told["grid"], side)
        return told

    def first(self, count: int, *, seed: int) -> Batch:
        """Return the first samples to train on, as many as these."""
        prepare = Preparation.of(self.train.info, seed=seed, device=torch.device("cpu"))
        return prepare(next(ordered(self.train, count)))

    @property
    def is_plane(self) -> bool:
        """Whether it can be drawn."""
        return self.points.shape[1] == 2

    def _log_density(self, points: Tensor) -> Tensor:
        assert self.density is not None
        return torch.from_numpy(self.density.log_density(points.numpy()))

    @property
    def _shown_labels(self) -> Tensor | None:
        return None if self.labels is None else self.labels[:SHOWN]


def data_set(name: str, section: SetSection, out: Path, *, seed: int) -> DataSet:
    """Return the data of a set, drawn where they are points that are not there yet."""
    if section.points is None:
        assert section.shards is not None and section.held_out is not None
        train, test = ShardSet.open(section.shards), ShardSet.open(section.held_out)
        return DataSet(name, train, test, *_rows(test), None)
    counts = {"train": section.num_train or NUM_TRAIN, "test": section.num_test or NUM_TEST}
    train, test = (
        write_points(
            out / "sets" / name / f"{section.points}-{part}-{count}-{seed}",
            section.points,
            n=count,
            seed=2 * seed + place,
        )
        for place, (part, count) in enumerate(counts.items())
    )
    points, labels = _rows(test)
    density = SETS[section.points]
    return DataSet(name, train, test, points, labels, density)


def _rows(shards: ShardSet) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all points (N, D) of shards, and their classes (N,) where they have some."""
    batches = list(ordered(shards, AT_ONCE))
    labels = torch.cat([batch["label"] for batch in batches]) if "label" in batches[0] else None
    return torch.cat([floats(batch["data"]) for batch in batches]), labels
