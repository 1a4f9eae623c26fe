"""What our code costs beside a reference, as ratios of rounds that alternate in one process.

Absolute times of a shared machine mean little, so every figure is a median over alternating rounds.
"""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..data.members import npy_bytes
from ..data.shards import ShardWriter, index_shards, write_atomically
from ..models.flow_map import FlowMap
from ..trainer.build import build, make_network
from ..trainer.ema import Constant, Ema
from ..trainer.fragment import Fragment
from ..trainer.hooks import stop_at_signals, update_ema
from ..trainer.latents import Preparation
from ..trainer.log import Journal
from ..trainer.loop import Run
from ..trainer.recipe import recipe_from
from ..trainer.saver import Saver
from .quickstart import recipe_named

STEPS_A_ROUND = 4
ROUND_S = 0.05  # the least that is timed at once, where a step is shorter
DIT = {"name": "dit", "width": 256, "depth": 8, "num_classes": 10}


def overhead(*, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds a step of our trainer, all hooks on, and of a bare loop, for a 9.8 M DiT."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _latent_run(Path(scratch))
        with run.batches, stop_at_signals(run) as stop:
            run.hooks += [update_ema, Journal(run), stop, Saver(), _stop_after_round]
            bare = _bare_loop(run)

            def ours() -> None:
                run.stop_asked = False
                run.train()

            name = "trainer step / bare loop"
            return [alternate(name, ours, bare, rounds=rounds, steps=STEPS_A_ROUND, unit="s/step")]


def ema(*, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of an update of one mean of the weights, and of diffusers' `EMAModel.step`.

    A 9.8 M DiT is bound by memory, the 1.9 M one of the quickstart also by the number of its tensors. Where
    processes share the parameters each of them updates its own, and `EMAModel` all.
    """
    from diffusers.training_utils import EMAModel

    rows = []
    for settings in (DIT, recipe_named("quickstart-teacher", []).model):
        model = make_network(settings)
        weights = [(name, p.detach()) for name, p in model.named_parameters()]
        size = f"{sum(p.numel() for _, p in weights) / 1e6:.1f} M in {len(weights)} tensors"
        for held, foreach in ((1, False), (1, True), (2, False)):
            # Of two processes that share the parameters each holds half the rows; moments are of no interest.
            parts = [(name, p.shape, p[: -(-len(p) // held)]) for name, p in weights]
            fragments = [Fragment(name, tuple(shape), 0, p, p, p, writes=True) for name, shape, p in parts]
            mean = Ema(fragments, {"ema": Constant(0.999)})
            theirs = EMAModel(model.parameters(), decay=0.999, foreach=foreach)
            name = f"Ema.update{' of 1 of 2 processes' if held == 2 else ''} / EMAModel.step"
            name += f"{' foreach=True' if foreach else ''}, {size}"
            steps = _repeats(mean.update)
            ours = _repeated(mean.update, steps)
            reference = _repeated(partial(theirs.step, list(model.parameters())), steps)
            rows.append(alternate(name, ours, reference, rounds=rounds, steps=steps, unit="s/update"))
    return rows


def _repeated(function: Callable[[], None], number: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(number):
            function()

    return repeated


def _repeats(function: Callable[[], None]) -> int:
    """Return how many calls of a function take at least ROUND_S: a power of 2."""
    number = 1
    while _seconds(_repeated(function, number)) < ROUND_S:
        number *= 2
    return number


def _stop_after_round(run: Run, losses: dict[str, Tensor]) -> None:
    run.stop_asked = run.step % STEPS_A_ROUND == 0


def alternate(
    name: str,
    ours: Callable[[], None],
    reference: Callable[[], None],
    *,
    rounds: int,
    steps: int,
    unit: str,
) -> dict[str, Any]:
    """Time both in turn, each doing `steps` steps a call, and return the seconds of a step.

    Medians, their ratio by pair, and the extremes; lower is better.
    """
    for warm_up in (ours, reference):
        warm_up()
    pairs = []
    for number in range(rounds):
        order = (ours, reference) if number % 2 else (reference, ours)
        times = {function: _seconds(function) / steps for function in order}
        pairs.append((times[ours], times[reference]))
    mine, theirs = zip(*pairs, strict=True)
    ratios = [one / other for one, other in pairs]
    return {
        "name": name,
        "ours": statistics.median(mine),
        "ours_min": min(mine),
        "ours_max": max(mine),
        "reference": statistics.median(theirs),
        "reference_min": min(theirs),
        "reference_max": max(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "unit": unit,
        "lower_is_better": True,
    }


def show(rows: list[dict[str, Any]], json_file: Path | None, console: Console) -> None:
    """Print rows as a table, and write them as JSON where asked."""
    table = Table()
    for column in ("name", "ours", "reference", "ratio", "unit"):
        table.add_column(column)
    for row in rows:
        cells = [
            f"{row[k]:.4g} ({row[k + '_min']:.4g} .. {row[k + '_max']:.4g})"
            for k in ("ours", "reference", "ratio")
        ]
        table.add_row(
            row["name"], *cells, f"{row['unit']}, {'lower' if row['lower_is_better'] else 'higher'} is better"
        )
    console.print(table)
    if json_file is not None:
        write_atomically(json_file, json.dumps(rows, indent=1).encode())


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _latent_run(folder: Path) -> Run:
    """Return a flow-matching run on random latents."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "latents") as writer:
        for number in range(1000):
            moments = generator.standard_normal((2, 4, 8, 8)).astype(np.float16)
            moments[1] = 0.1
            writer.write(
                f"{number:06d}", {"moments.npy": npy_bytes(moments), "cls": str(number % 10).encode()}
            )
    index_shards(folder / "latents")
    settings = {
        "data": {"shards": str(folder / "latents"), "batch_size": 128},
        "model": DIT,
        "objective": {"name": "flow_matching", "condition_dropout": 0.1},
        "optimizer": {"lr": 1e-4},
        "training": {"steps": 10**6, "save_every": 10**6},
    }
    return build(recipe_from(settings), folder / "run")


def _bare_loop(run: Run) -> Callable[[], None]:
    """Return the loop that one writes first: the same model and optimizer on one batch that lies ready."""
    assert isinstance(run.model, FlowMap)
    model = copy.deepcopy(run.model.backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = Preparation.of(run.shards.info, seed=0, device=run.strategy.world.device)(next(run.batches))

    classes = batch.condition
    assert isinstance(classes, Tensor)

    def loop() -> None:
        for _ in range(STEPS_A_ROUND):
            noise, t = torch.randn_like(batch.data), torch.rand(len(batch.data))
            x = torch.lerp(batch.data, noise, t[:, None, None, None])
            labels = torch.where(torch.rand(len(t)) < 0.1, 10, classes)
            loss = (model(x, t, t, labels) - (noise - batch.data)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return loop
