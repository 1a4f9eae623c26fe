"""What a config will cost, before it runs: memory by strategy, operations, checkpoints, and what to choose.

Nothing is allocated at any size: see trainer/cost.py. What is kept for the backward is what autograd saves on
CPUs, in the dtypes of the recipe's precision; a GPU's own workspaces and fragmentation are not in it, so a
plan fits where it takes no more than `USABLE` of the memory.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..data.shards import write_atomically
from ..trainer.blocks import blocks, set_up_blocks
from ..trainer.config import ConfigError
from ..trainer.cost import (
    ELEMENT,
    Held,
    Loss,
    flops,
    held,
    losses,
    network_of,
    num_bytes,
    num_parameters,
)
from ..trainer.ema import kinds_of
from ..trainer.recipe import Ddp, Fsdp, Recipe, Zero

USABLE = 0.9
GIB = 2**30
DEFAULT_GIB = 80.0
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {
    "parameters": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "ema": "ema",
    "frozen": "frozen",
    "working": "engine",
    "activations": "activ",
    "total": "total",
    "on_cpu": "on CPU",
}


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe on `world` processes; `rows` by strategy, with ` + offload` where it has one."""

    world: int
    num_parameters: int
    micro_batch: int  # samples of a process in one micro step
    flops_a_step: float  # of all processes
    checkpoint_bytes: int
    memory_gib: float  # of one GPU
    rows: dict[str, Held]
    advice: str


def plan(recipe: Recipe, world: int, *, memory_gib: float | None = None) -> Plan:
    """Return the plan of a recipe on `world` processes; GPUs are as large as those here, else 80 GiB."""
    model = network_of(recipe.model)
    micro_batch, left = divmod(recipe.data.batch_size, recipe.training.accumulation * world)
    if left or not micro_batch:
        raise ConfigError(
            f"data.batch_size: {recipe.data.batch_size} samples do not come out even over {world} processes "
            f"of {recipe.training.accumulation} micro steps (training.accumulation); give a multiple of "
            f"{recipe.training.accumulation * world}"
        )
    memory = memory_gib or _memory_here()
    rows = _rows(recipe, model, world, micro_batch=micro_batch)
    return Plan(
        world=world,
        num_parameters=num_parameters(model),
        micro_batch=micro_batch,
        flops_a_step=flops(recipe) * recipe.data.batch_size,
        checkpoint_bytes=checkpoint_bytes(recipe, model),
        memory_gib=memory,
        rows=rows,
        advice=advise(rows, memory),
    )


def checkpoint_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Return the bytes of a checkpoint: parameters and buffers, two moments and the means, all fp32."""
    return num_bytes(model) + (2 + len(kinds_of(recipe.ema))) * ELEMENT * num_parameters(model)


def _memory_here() -> float:
    on_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else DEFAULT_GIB


def _rows(recipe: Recipe, model: nn.Module, world: int, *, micro_batch: int) -> dict[str, Held]:
    """Return what a process holds under every strategy; fsdp's shard_size is the recipe's, if it has one."""
    asked = recipe.strategy
    shard_size = asked.shard_size if isinstance(asked, Fsdp) else None
    strategies = {"ddp": Ddp(), "fsdp": Fsdp(name="fsdp", shard_size=shard_size)}
    strategies |= {name: Zero(name=name) for name in ("zero1", "zero2", "zero3")}
    strategies |= {
        f"{name} + offload": replace(strategy, offload=True)
        for name, strategy in strategies.items()
        if not isinstance(strategy, Ddp)
    }
    sample, once = activations(recipe)
    rows = {}
    for name, strategy in strategies.items():
        found = held(replace(recipe, strategy=strategy), model, world)
        # FSDP2 itself gathers blocks in half precision, and lets go of them.
        kept = sample * micro_batch + (0 if isinstance(strategy, Fsdp) else once)
        rows[name] = replace(found, activations=round(kept))
    return rows


def advise(rows: dict[str, Held], memory_gib: float) -> str:
    """Return what to choose: the simplest strategy that fits, as it is also the fastest."""
    usable = USABLE * memory_gib * GIB
    fits = [name for name, row in rows.items() if row.total <= usable]
    if "ddp" in fits:
        saved = rows["ddp"].total - rows["zero1"].total
        text = f"Use ddp: {amount(rows['ddp'].total)} of {memory_gib:g} GiB."
        return text + (f" zero1 would save {amount(saved)}." if saved > 0 else "")
    for name in ("zero1", "fsdp", "zero2", "zero3"):
        if name in fits:
            return f"ddp does not fit; use {name}: {amount(rows[name].total)} of {memory_gib:g} GiB."
    for name in ("fsdp + offload", "zero3 + offload", "zero2 + offload", "zero1 + offload"):
        if name in fits:
            settings = f"strategy.name={name.split()[0]} strategy.offload=true"
            return (
                f"Nothing fits as it is: use more processes, or {settings} with "
                f"{amount(rows[name].on_cpu)} of CPU memory a process."
            )
    row = rows["fsdp + offload"]
    if row.activations > usable / 2:
        return (
            f"Nothing fits: the activations alone are {amount(row.activations)}. Raise "
            "training.accumulation, set training.recompute_every=1, or use more processes."
        )
    left = amount(row.total)
    return f"Nothing fits, not even with offload ({left} with fsdp): use GPUs with more memory."


def show(found: Plan, json_file: Path | None, console: Console) -> None:
    """Print a plan as a table with advice, and write it as JSON where asked."""
    size, unit = (GIB, "GiB") if found.rows["ddp"].total >= GIB else (2**20, "MiB")
    table = Table(
        title=f"{unit} a process; {found.world} processes, {found.micro_batch} samples each",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in found.rows.items():
        cells = [getattr(row, column) / size for column in COLUMNS]
        table.add_row(name, *(f"{cell:.0f}" if cell >= 100 else f"{cell:.2f}" for cell in cells))
    console.print(table)
    work = f"{found.flops_a_step:.3g} FLOPs a step of all processes"
    disk = f"{amount(found.checkpoint_bytes)} a checkpoint"
    console.print(f"{found.num_parameters / 1e6:,.1f} M parameters; {work}; {disk}", soft_wrap=True)
    console.print(found.advice, soft_wrap=True)
    if json_file is not None:
        rows = {name: {**asdict(row), "total": row.total} for name, row in found.rows.items()}
        write_atomically(json_file, json.dumps({**asdict(found), "rows": rows}, indent=1).encode())


def amount(num_bytes: int) -> str:
    """Return bytes as a person reads them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{num_bytes} B" if num_bytes else "-"


def activations(recipe: Recipe) -> tuple[float, float]:
    """Return the bytes that a sample keeps for the backward, and those kept once, whatever the batch.

    The latter are half-precision copies of weights. Of blocks that are made again one is whole at a time.
    """
    training, sample, once = recipe.training, 0.0, 0.0
    # The fused forms of attention keep the same; those for GPUs cannot run here.
    form = replace(training, attention="math" if training.attention == "math" else "sdpa", compile=False)
    for share, made, loss_of in losses(recipe):
        with made as model:
            kept = partial(_kept, model, loss_of(model), HALF.get(training.precision))
            set_up_blocks(model, replace(form, recompute_every=None))
            two, four = kept(2), kept(4)
            slope, fixed = (four - two) / 2, 2 * two - four
            if training.recompute_every is not None:
                again = blocks(model)[:: training.recompute_every]
                set_up_blocks(model, form)
                fewer = (kept(4, again=again) - kept(2, again=again)) / 2
                slope = fewer + (slope - fewer) / len(again)
        sample, once = sample + share * slope, max(once, fixed)
    return sample, once


def _kept(
    model: nn.Module, loss: Loss, half: torch.dtype | None, batch: int, *, again: Sequence[nn.Module] = ()
) -> int:
    """Return the bytes that a forward keeps, each storage once, without those of the model itself.

    A block that is made `again` keeps its inputs, which no hook of autograd sees.
    """
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own and not x._is_zerotensor():
            kept[storage._cdata] = storage
        return x

    def note_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for x in inputs:
            note(x) if isinstance(x, Tensor) else None

    handles = [block.register_forward_pre_hook(note_inputs) for block in again]
    precision: Any = half
    with saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", precision, enabled=half is not None):
        loss(batch)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())
