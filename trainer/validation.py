"""Evaluation while a run trains: what the mean weights of a step do on held-out samples, on all processes.

Every `evaluation.every` steps, and at the end, the EMA weights are exchanged in. They give the loss of the
objective itself on held-out samples, with the same noise every time; where features are named, samples whose
noise is that of `driftmap evaluate` give distances, beside their floors. A line of RUN/validation.jsonl each.
The weights come back bitwise and randomness is keyed: a run trains the same with evaluation and without.

A sharded network can be called only through the strategy's task and by all processes equally often: one that
has no batch left takes the first again and does not count it. The precision is that of the training.

A signal ends an evaluation without a line; the run saves and stops at that step, and goes on with the
evaluation before any other step. Lines of steps that a run went back from are forgotten when it starts.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..data.shards import write_atomically
from ..models.autoencoder import decode_latents
from ..models.condition import parted
from ..models.flow_map import FlowMap, Velocity
from ..models.samplers import sampler_of
from .build import settings_of_run
from .evaluate import noise_of
from .guiding import guided, usual_sampler
from .held_out import Gallery, gallery_of, held_out_of
from .judge import Meter
from .loop import Run, Task
from .objective import Batch, Tangent
from .recipe import EvaluationSection, objective_name
from .references import Dealer, key_of
from .signals import Stopped
from .unfinished import Unfinished

SEED = 0  # of the samples' noise, as `driftmap evaluate` has it


@dataclass(frozen=True)
class Sampling:
    """Samples of a batch's conditions in place of an objective; their noise is that of their index."""

    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    tangent: ClassVar[Tangent] = "none"

    sampler: str
    nfe: int
    guidance: float

    def __call__(self, model: FlowMap, batch: Batch, teacher: Velocity | None = None) -> dict[str, Tensor]:
        """Return `samples` (B, ...)."""
        noise = noise_of(batch.random.index, model.sample_shape, seed=SEED)
        velocity = guided(model, self.guidance)
        sampler = sampler_of(
            self.sampler,
            path=model.path_of_states,
            draw=lambda step: batch.random.normal(f"sample step {step}", model.sample_shape),
        )
        cost = sampler.evaluations * getattr(velocity, "evaluations", 1)
        grid = sampler.grid(self.nfe // cost).to(noise.device)
        condition, _ = parted(batch.condition, self.guidance)  # not under the scales of the training
        return {"samples": sampler.sample(velocity, noise, grid=grid, condition=condition)}


class Validation:
    """A hook that evaluates when a period ends; it comes before the one that agrees to stop."""

    def __init__(self, run: Run) -> None:
        assert run.recipe.evaluation is not None
        self._section: EvaluationSection = run.recipe.evaluation
        self._strategy, world = run.strategy, run.strategy.world
        network = settings_of_run(run.folder)
        self._held_out = held_out_of(run.recipe, run.model, network, run.shards)
        self._gallery = gallery_of(run.recipe, run.model, run.shards, self._held_out, device=world.device)
        self._dealer = Dealer(world, self._section.batch_size)
        self._task = next(module for module in self._strategy.task.modules() if isinstance(module, Task))
        self.file = run.folder / "validation.jsonl"
        world.first(lambda: _write(self.file, [row for row in _rows(self.file) if row["step"] <= run.step]))
        if run.step:
            self._look(run)
            run.stop_asked = world.stopping()

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Evaluate the step just done where it is due."""
        if run.strategy.stepped:
            self._look(run)

    def _look(self, run: Run) -> None:
        """Evaluate this step if it is due and has not been."""
        world = self._strategy.world
        due = run.step % self._section.every == 0 or run.finished
        if not due or world.first(lambda: run.step in [row["step"] for row in _rows(self.file)]):
            return
        began = time.monotonic()
        loss, quality = (self._unfinished(run, part) for part in ("loss", "quality"))
        try:
            with torch.no_grad(), _mean_of(run):
                told = self._losses(loss) | (self._quality(self._gallery, quality) if self._gallery else {})
        except Stopped:
            run.evaluated = False
            return
        finally:
            seconds = time.monotonic() - began
            run.evaluated_s += seconds
        row = {"step": run.step, "samples": run.samples, **told, "seconds": seconds}
        world.first(lambda: _write(self.file, [*_rows(self.file), row]))
        for each in (loss, quality):
            each.forget()
        if world.rank == 0:
            Console(stderr=True).print(_in_words(row), markup=False, highlight=False, soft_wrap=True)

    def _unfinished(self, run: Run, part: str) -> Unfinished:
        """Return what there is of a part of this step's evaluation where it was stopped before."""
        about = {"step": run.step, "means": run.ema.num_updates, "section": asdict(self._section)}
        about |= {"held_out": self._held_out.shards.fingerprint}
        if self._gallery is not None:
            about |= {"judge": self._gallery.judge.hash}
        return Unfinished(self.file.with_name(f"validation-{part}"), about, self._strategy.world)

    def _batch(self, places: np.ndarray) -> dict[str, Tensor]:
        """Return held-out samples; what cannot be read on one process is raised on all."""
        read: list[dict[str, Tensor]] = []
        self._strategy.world.together(lambda: read.append(self._held_out.batch(places)))
        return read[0]

    def _losses(self, unfinished: Unfinished) -> dict[str, float | None]:
        """Return the means of what the objective gives on held-out samples; None for what is not finite."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

        def take(state: dict[str, Tensor]) -> None:
            for name, value in state.items():
                sums[name] += value

        dealt = partial(self._dealer.in_step, self._held_out.size)
        for places, mine in unfinished.resumed(dealt, take=take, state=lambda: dict(sums)):
            for name, value in self._strategy.task(self._batch(places)).items():
                if name not in ("time", "gap", "index"):
                    mean, count = value.double().mean().item(), len(places)
                    sums[name] += torch.tensor([mean * count, count] if mine else [0.0, 0.0])
        totals = self._strategy.world.total(torch.stack([*sums.values()])).tolist()
        means = {name: total / count for name, (total, count) in zip(sums, totals, strict=True)}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def _quality(self, gallery: Gallery, unfinished: Unfinished) -> dict[str, Any]:
        """Return the table of samples by number of evaluations, its floors, and what it was made with."""
        section, world, judge = self._section, self._strategy.world, gallery.judge
        references = gallery.references(self._dealer)
        real = references.seen(gallery.pictures)
        floors = {"self": references.seen(gallery.training)} if gallery.training else {}
        if gallery.autoencoder is not None:
            floors["reconstruction"] = references.seen(gallery.pictures, reconstructed=True)
        built_in = isinstance(self._task.model, FlowMap) and self._task.model.takes_guidance
        sampler = usual_sampler(objective_name(self._task.objective), section.guidance, built_in=built_in)
        meters = {nfe: Meter(judge, section.num_samples) for nfe in section.nfe}

        def take(state: dict[int, Any]) -> None:
            for nfe, meter in meters.items():
                meter.add(state[nfe])

        def state() -> dict[int, Any]:
            return {nfe: meter.state() for nfe, meter in meters.items()}

        dealt = partial(self._dealer.in_step, section.num_samples)
        for places, mine in unfinished.resumed(dealt, take=take, state=state):
            batch = self._batch(places) | {"index": torch.from_numpy(places)}
            prompts = gallery.asked.prompts(places, judge, world.device)
            for nfe, meter in meters.items():
                pictures = self._pictures(Sampling(sampler, nfe, section.guidance), batch, gallery)
                if mine:
                    meter.update(pictures, places, prompts)
        seen = {nfe: meter.seen(world) for nfe, meter in meters.items()}

        def compared() -> dict[str, Any]:
            floor = {name: each.compared(real, seed=SEED) for name, each in floors.items()}
            if "self" in floor:
                floor["self"] |= real.answers  # of the training split a probe has been told
            rows = [{"nfe": nfe, **each.compared(real, seed=SEED)} for nfe, each in seen.items()]
            return {"floor": floor, "rows": rows}

        return {
            "features": judge.features.name,
            "features_hash": judge.features.hash,
            "sampler": sampler,
            "guidance": section.guidance,
            "num_samples": section.num_samples,
            "num_references": gallery.pictures.size,
            "seed": SEED,
            "autoencoder": gallery.autoencoder_hash,
            "reference": gallery.pictures.shards.fingerprint,
            "reference_statistics": key_of(references.about(gallery.pictures)),
            **world.first(compared),
        }

    def _pictures(self, sampling: Any, batch: dict[str, Tensor], gallery: Gallery) -> Tensor:
        """Return pictures (B, C, H, W) in [-1, 1], sampled through the task as a loss is."""
        objective, self._task.objective = self._task.objective, sampling
        try:
            samples = self._strategy.task(batch)["samples"].float()
        finally:
            self._task.objective = objective
        if gallery.autoencoder is not None:
            return decode_latents(gallery.autoencoder, samples)
        return samples.clamp(-1, 1)


@contextmanager
def _mean_of(run: Run) -> Iterator[None]:
    """Let a run's model hold the mean weights and be in evaluation."""
    with run.ema.swapped_in(refresh=run.strategy.refresh):
        run.model.eval()
        try:
            yield
        finally:
            run.model.train()


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the lines, whole or not at all."""
    if rows or file.exists():
        write_atomically(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _in_words(row: dict[str, Any]) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4g}"
    distances = ", ".join(f"{each['frechet']:.4g} in {each['nfe']}" for each in row.get("rows", ()))
    return f"step {row['step']}: held-out loss {loss}" + (
        f"; Fréchet distance {distances}" if distances else ""
    )
