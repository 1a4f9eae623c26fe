"""A process of a group that differentiates a sharded network, for test_pretrained.py."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from driftmap.trainer.blocks import blocks
from driftmap.trainer.tangent import time_derivative

S, T = torch.tensor([0.9, 0.6], dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)


def slopes(model: Any, how: str) -> tuple[Tensor, Tensor]:
    """Return the derivatives of a flow map along s and along t, in float64."""
    shape = (2, *model.sample_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    condition = model.any_condition(2)
    if isinstance(condition, tuple):
        condition = type(condition)(condition.tokens.double(), condition.mask)
    along = [lambda s: model.jump(x, s, T, condition), lambda t: model.jump(x, S, t, condition)]
    if how == "forward":
        return tuple(time_derivative(f, at, how="forward")[1] for f, at in zip(along, (S, T), strict=True))  # pyright: ignore
    step = 1e-6
    return tuple((f(at + step) - f(at - step)) / (2 * step) for f, at in zip(along, (S, T), strict=True))  # pyright: ignore


def difference(model: Any, expected: tuple[Tensor, Tensor]) -> float:
    """Return how far the derivatives of a model are from expected ones, relative to these."""
    found = slopes(model, "forward")
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def work(model: Any, rank: int, folder: Path) -> None:
    """Shard a model among two processes, and write how far its derivatives are from finite differences."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    expected = slopes(copy.deepcopy(model), "difference")
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model.backbone, mesh=mesh)
    (folder / str(rank)).write_text(str(difference(model, expected)))
    dist.destroy_process_group()
