"""A judge looks at pictures as they pass and keeps what the metrics need: no matrix of all their features.

Of any number of samples it keeps mean and covariance, the features of at most MOST_KEPT of them (for kernel
distance and neighbours, the same ones on any number of processes), and the sums of its answers.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.backbones.convnet import ConvNet
from .checkpoint import fingerprint
from .features import CaptionJudge, Features
from .metrics.blindness import ALIGNMENT, ALIGNMENT_ERROR, SHUFFLED
from .metrics.chosen import chosen
from .metrics.frechet import Moments, frechet_distance
from .metrics.kernel import kernel_distance
from .metrics.neighbours import Cloud, neighbour_shares
from .world import World

MOST_KEPT = 10_000
_SQUARES = "squares"  # of the differences between own and shuffled captions


@dataclass(frozen=True)
class Prompts:
    """What pictures (B, ...) were asked for: classes (B,), features of their captions and of others'."""

    labels: Tensor | None = None
    captions: Tensor | None = None
    shuffled: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """What a judge saw of a set of pictures; `points` (n, F) are features of the samples it kept."""

    moments: Moments
    points: Tensor
    answers: dict[str, float]

    @cached_property
    def cloud(self) -> Cloud:
        """The balls around the points."""
        return Cloud(self.points)

    def compared(self, real: "Seen", *, seed: int) -> dict[str, float]:
        """Return every metric of these pictures against real ones."""
        return {
            "frechet": frechet_distance(self.moments, real.moments),
            "kernel": kernel_distance(self.points, real.points, seed=seed),
            **neighbour_shares(self.cloud, real.cloud),
            **self.answers,
        }


@dataclass(frozen=True)
class Judge:
    """What pictures are compared by: features, a classifier that knows the classes, CLIP for captions."""

    features: Features
    probe: ConvNet | None = None
    captions: CaptionJudge | None = None

    @cached_property
    def hash(self) -> str:
        """A hash of all that it sees with."""
        parts = [self.features.hash, self.probe and fingerprint(self.probe)]
        parts += [self.captions and self.captions.features.hash, MOST_KEPT]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def questions(self) -> list[str]:
        """The sums that a meter keeps."""
        alignment = [ALIGNMENT, SHUFFLED, _SQUARES] if self.captions else []
        return ["class_accuracy"] * (self.probe is not None) + alignment

    @torch.no_grad()
    def answers(self, pictures: Tensor, prompts: Prompts) -> list[Tensor]:
        """Return the answers (B,) to its questions about pictures (B, C, H, W) in [-1, 1]."""
        found = []
        if self.probe is not None:
            assert prompts.labels is not None
            found.append(self.probe(pictures).argmax(1) == prompts.labels)
        if self.captions is not None:
            assert prompts.captions is not None and prompts.shuffled is not None
            seen = F.normalize(self.captions.features(pictures), dim=1)
            own, other = ((seen * text).sum(1) for text in (prompts.captions, prompts.shuffled))
            found += [own, other, (own.double() - other.double()).square()]
        return found


class Meter:
    """A judge in front of a stream of `total` pictures, of which each process sees a part."""

    def __init__(self, judge: Judge, total: int) -> None:
        self.judge = judge
        self.moments = Moments.empty(judge.features.num_features)
        self._kept = chosen(total, MOST_KEPT)
        self._rows: list[tuple[np.ndarray, Tensor]] = []
        self._sums = torch.zeros(len(judge.questions), dtype=torch.float64)

    def update(self, pictures: Tensor, numbers: np.ndarray, prompts: Prompts) -> None:
        """Look at the pictures (B, C, H, W) in [-1, 1] of the samples with these numbers (B,)."""
        features = self.judge.features(pictures)
        self.moments.update(features)
        kept = np.isin(numbers, self._kept)
        self._rows.append((numbers[kept], features[torch.from_numpy(kept)].float().cpu()))
        for place, answer in enumerate(self.judge.answers(pictures, prompts)):
            self._sums[place] += answer.double().sum().cpu()

    def state(self) -> dict[str, Any]:
        """Return what this process saw so far, to be added to another meter."""
        moments, rows = self.moments, [(torch.from_numpy(numbers), points) for numbers, points in self._rows]
        kept = {"count": moments.count, "mean": moments.mean, "scatter": moments.scatter}
        return kept | {"rows": rows, "sums": self._sums}

    def add(self, state: dict[str, Any]) -> None:
        """Add what another meter saw."""
        self.moments.add(Moments(state["count"], state["mean"], state["scatter"]))
        self._rows += [(numbers.numpy(), points) for numbers, points in state["rows"]]
        self._sums += state["sums"]

    def seen(self, world: World) -> Seen:
        """Return what all processes saw, the same to each; every process must call."""
        moments = self.moments.merged(world)
        rows = [row for process in world.gathered(self._rows) for row in process]
        order = np.argsort(np.concatenate([numbers for numbers, _ in rows]))
        points = torch.cat([features for _, features in rows])[torch.from_numpy(order)]
        means = world.total(self._sums.clone()) / moments.count
        answers = dict(zip(self.judge.questions, means.tolist(), strict=True))
        if _SQUARES in answers:
            gain = answers[ALIGNMENT] - answers[SHUFFLED]
            variance = max(answers.pop(_SQUARES) - gain**2, 0.0)
            answers[ALIGNMENT_ERROR] = math.sqrt(variance / moments.count)
        return Seen(moments, points, answers)
