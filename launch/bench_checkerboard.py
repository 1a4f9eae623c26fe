"""Flow maps from scratch on the checkerboard: every rule in one table, beside what was published.

Data are uniform on the 8 dark squares of a 4 x 4 board over [-1, 1]^2, new ones in every step. The budget of
a rule is processor time of its training, all threads together; measuring is not counted. How the KL is
measured is in checkerboard_measure.py.

Published: Boffi, Albergo and Vanden-Eijnden, "How to build a consistency model", 2025, the table of
flow-maps.github.io: 250,000 steps of 100,000 points, a plain network of 4 layers of 512 with GELU. How it
estimates the KL is not documented, so a ratio to it says how far two numbers are apart, not how far two
models are. Ours sees the coordinates alone, too, but is smaller, is modulated by the times, and takes some
10,000 steps of 2,048 points, a 1,200th of theirs. With waves of the state (`state_frequencies`), which fit
the edges of the squares, every KL is far smaller, and that of the flow falls further than those of jumps.
"""

import itertools
import math
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.backbones.mlp import MLP
from ..models.flow_map import FlowMap
from ..trainer.config import plugin_class
from ..trainer.ema import Ema, Power
from ..trainer.error_weighting import log_variance_of
from ..trainer.fragment import Fragment
from ..trainer.objective import Objective
from ..trainer.progress import progress
from ..trainer.recipe import OBJECTIVES
from ..trainer.times import Pairs, Uniform
from .bench_loader import row
from .checkerboard_measure import (
    CELLS,
    FLOW_STEPS,
    NUM_SETS,
    batch,
    floor,
    fresh_noise,
    kls,
    samples,
    title,
)

STEPS = (1, 2, 4, 8, 16)
MARKS = tuple(2.0**-power for power in (6, 5, 4, 3, 2, 1, 0))  # shares of the budget where the KL is taken
RULES: dict[str, dict[str, Any]] = {
    "lagrangian": {"name": "lagrangian"},
    "eulerian": {"name": "eulerian", "velocity": "self", "gradient": "residual"},
    "semigroup": {"name": "semigroup", "split": "half"},
    "semigroup uniform": {"name": "semigroup", "split": "uniform"},
}
PUBLISHED = {
    "lagrangian": (0.0864, 0.0765, 0.0708, 0.0699, 0.0710),
    "eulerian": (0.0983, 0.0921, 0.0834, 0.0816, 0.0751),
    "semigroup": (0.1456, 0.0891, 0.0812, 0.0717, 0.0689),
    "semigroup uniform": (0.1113, 0.1067, 0.0747, 0.0727, 0.0679),
}


@dataclass(frozen=True)
class Setting:
    """What is the same for all rules: budget, network and optimizer."""

    minutes: float = 10.0  # of processor time
    steps: int | None = None  # end earlier, after so many
    batch_size: int = 2048
    width: int = 128
    depth: int = 2  # of two layers
    state_frequencies: int = 0
    lr: float = 3e-3
    hold_steps: int = 1000  # then the rate falls with the root of the step
    diagonal: float = 0.5
    shift: float = 0.4  # of the times of training, towards the data
    weighting: str = "constant"
    clip: float = 10.0
    ema_width: float = 0.1
    seed: int = 0
    num_samples: int = 2**16  # of a set

    def marks(self, steps: int, seconds: float) -> int:
        """Return how many MARKS of the budget are reached."""
        spent = seconds / (60 * self.minutes)
        share = max(spent, steps / self.steps) if self.steps else spent
        return sum(share >= mark for mark in MARKS)

    def lasting(self) -> dict[str, Any]:
        """Return all but the budget: what a training that goes on must have been trained with."""
        return {key: value for key, value in asdict(self).items() if key not in ("minutes", "steps")}


class Training:
    """One rule at work, and what it has come to: `curve` has a row of KL for every mark."""

    def __init__(self, rule: str, setting: Setting) -> None:
        self.rule, self.setting = rule, setting
        torch.manual_seed(setting.seed)
        self.model = FlowMap(
            MLP(
                width=setting.width,
                depth=setting.depth,
                state_frequencies=setting.state_frequencies,
                modulated=True,
            )
        )
        kind = plugin_class(OBJECTIVES, RULES[rule]["name"], place="objective")
        arguments = {key: value for key, value in RULES[rule].items() if key != "name"}
        self.objective: Objective = kind(
            pairs=Pairs(times=Uniform(shift=setting.shift), diagonal=setting.diagonal),
            weighting={"name": setting.weighting},
            **arguments,
        )
        self.model.log_variance = log_variance_of(self.objective)
        parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=setting.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        live = [
            Fragment(name, tuple(p.shape), 0, p.detach(), p.detach(), p.detach(), writes=True)
            for name, p in parameters.items()
        ]
        self.ema = Ema(live, {"ema": Power(setting.ema_width)})
        self.steps, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def train(self, file: Path | None, *, shown: bool) -> None:
        """Train until the budget is spent, from where `file` left off; it is written at every mark.

        Neither learning rate nor mean of the weights knows the budget, so a larger one goes on as well.
        """
        if file is not None and file.exists():
            self._restore(file)
        total, marks = round(60 * self.setting.minutes), self.setting.marks(self.steps, self.seconds)
        with progress(self.rule, total, unit="s of processor time", shown=shown) as update:
            while marks < len(MARKS):
                began = time.process_time()
                losses = self._step()
                self.seconds += time.process_time() - began
                note = (
                    f"jump {losses['error_jump'].mean():.3f}, diagonal {losses['error_diagonal'].mean():.3f}"
                )
                update(min(total, round(self.seconds)), note)
                if (reached := self.setting.marks(self.steps, self.seconds)) > marks:
                    marks = reached
                    self.curve.append(self._row())
                    if file is not None:
                        self._save(file)

    def _step(self) -> dict[str, Tensor]:
        size, setting = self.setting.batch_size, self.setting
        losses = self.objective(self.model, batch(self.steps * size, size, seed=setting.seed))
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), setting.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = setting.lr / math.sqrt(1 + self.steps / setting.hold_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.steps += 1
        return losses

    def _row(self) -> dict[str, float]:
        noise = fresh_noise(self.setting.num_samples)
        with self.averaged():
            found = {str(n): statistics.median(kls(samples(self.model, noise, n))) for n in STEPS[:3]}
        place = {"steps": self.steps, "points": self.steps * self.setting.batch_size, "seconds": self.seconds}
        return place | found

    def averaged(self) -> AbstractContextManager[None]:
        """Let the model hold the mean of its weights inside a `with`."""
        return self.ema.swapped_in("ema", refresh=lambda: None)

    def _save(self, file: Path) -> None:
        state = {
            "setting": self.setting.lasting(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": (self.ema.means["ema"], self.ema.num_updates),
            "progress": (self.steps, self.seconds, self.curve),
        }
        written = file.with_suffix(".new")
        torch.save(state, written)
        written.replace(file)

    def _restore(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        if state["setting"] != self.setting.lasting():
            raise ValueError(
                f"{file} was trained with {state['setting']}, and now it is {self.setting.lasting()}; name "
                "another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.means["ema"], self.ema.num_updates = state["ema"]
        self.steps, self.seconds, self.curve = state["progress"]


def checkerboard(
    rules: list[str], setting: Setting, *, out: Path | None = None, shown: bool = True
) -> list[dict[str, Any]]:
    """Return the KL of every rule at STEPS beside what was published, and the comparisons between rules.

    With `out` every training goes on from its last mark there, and pictures of what came out lie there.
    """
    if unknown := sorted(set(rules) - set(RULES)):
        raise ValueError(f"there is no rule {unknown[0]!r}; there are {', '.join(RULES)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    trainings = [Training(rule, setting) for rule in rules]
    noise, found = fresh_noise(setting.num_samples), {}
    for training in trainings:
        training.train(out and out / f"{training.rule.replace(' ', '-')}.pt", shown=shown)
        with training.averaged():
            found[training.rule] = {n: samples(training.model, noise, n) for n in (*STEPS, FLOW_STEPS)}
    if out is not None:
        _draw(trainings, found, out)
    measured = {rule: {n: kls(points) for n, points in at.items()} for rule, at in found.items()}
    return rows_of(measured, setting.num_samples)


def rows_of(found: dict[str, dict[int, list[float]]], num_samples: int) -> list[dict[str, Any]]:
    """Return the table of KLs by rule and number of steps, where FLOW_STEPS stands for the flow.

    The spread is over sets of samples of one training.
    """
    expected = (CELLS**2 / 2 - 1) / (2 * num_samples)
    pairs = [("floor: fresh data / expected", floor(num_samples), [expected] * NUM_SETS)]
    for rule, at in found.items():
        published = zip(STEPS, PUBLISHED[rule], strict=True)
        pairs += [(f"{rule} {title(n)}", at[n], [kl] * NUM_SETS) for n, kl in published]
        pairs += [(f"{rule} {title(4)} / its own {title(FLOW_STEPS)}", at[4], at[FLOW_STEPS])]
    lagrangian = found.get("lagrangian", {})
    for rule, n in itertools.product([rule for rule in found if rule != "lagrangian"], STEPS[:2]):
        if lagrangian:
            pairs += [(f"lagrangian / {rule}, {title(n)}", lagrangian[n], found[rule][n])]
    return [row(name, ours, other, unit="nats", lower_is_better=True) for name, ours, other in pairs]


def _draw(trainings: list[Training], found: dict[str, dict[int, Tensor]], out: Path) -> None:
    from .checkerboard_pictures import GRID, draw_curves, draw_map, draw_samples

    draw_samples(
        {rule: {title(n): at[n] for n in (1, 2, 4, 16, FLOW_STEPS)} for rule, at in found.items()}, out
    )
    landed: dict[str, dict[str, Tensor]] = {}
    for training in trainings:
        with training.averaged():
            landed[training.rule] = {title(n): samples(training.model, GRID, n) for n in (1, 4, FLOW_STEPS)}
    draw_map(landed, out)
    draw_curves(
        {one.rule: one.curve for one in trainings},
        statistics.median(floor(trainings[0].setting.num_samples)),
        out,
    )
