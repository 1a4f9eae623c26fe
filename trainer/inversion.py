"""From data to noise and back by one network, and what is lost on the way.

    x     = alpha(start) data + sigma(start) n     the state at the first time, which n is keyed by the sample
    noise = X_{start,1}(x)                         should have mean 0 and spread 1
    back  = X_{1,start}(noise)                     its distance to x is the round-trip error
    data  = X_{1,0}(noise)                         the reconstruction

each in N steps of the sampler along the same times. The way does not start from the data: a velocity may be
infinite at t = 0, and data without noise are no state that the network has seen.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.flow_map import FlowMap
from ..models.samplers import time_grid
from .objective import Batch

SHOWN = 10  # pictures


@dataclass(frozen=True)
class RoundTrip:
    """A batch's state at the first time, its noise, the state that this gives back, and the data (B, ...)."""

    state: Tensor
    noise: Tensor
    back: Tensor
    data: Tensor


@torch.no_grad()
def round_trip(
    model: FlowMap, batch: Batch, sample: Callable[..., Tensor], *, num_steps: int, start: float
) -> RoundTrip:
    """Carry a batch to noise and back by `sample`, a sampler that also goes from data to noise."""
    path, data, condition = model.path, batch.data, batch.condition
    grid = path.on_grid(start + (1 - start) * time_grid(num_steps, device=data.device))
    first = grid[-1:].to(data.dtype).expand(len(data))
    drawn = batch.random.normal("first noise", tuple(data.shape[1:])).to(data.dtype)
    state = path.state(data, drawn, first)
    noise = sample(model, state, grid=grid.flip(0), condition=condition)
    near = sample(model, noise, grid=grid[:-1], condition=condition)
    back = sample(model, near, grid=grid[-2:], condition=condition)
    ends = torch.stack([grid[-2], torch.zeros_like(grid[-1])])
    return RoundTrip(state, noise, back, sample(model, near, grid=ends, condition=condition))


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio 10 log10(2^2 / mean square) of pictures in [-1, 1], dB (B,)."""
    return 10 * (4 / (found - wanted).double().square().flatten(1).mean(1)).log10()


def measure_round_trips(
    model: FlowMap,
    batches: Iterable[Batch],
    sample: Callable[..., Tensor],
    *,
    num_steps: int,
    start: float,
    pictures: Callable[[Tensor], Tensor] | None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Return what round trips lose, JSON-ready, and the first pictures, given and reconstructed (2, P, ...).

    `pictures` turns samples into pictures in [-1, 1]; None where they are no pictures.
    """
    count, dimensions, ratio, shown = 0, 0, 0.0, None
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        trip = round_trip(model, batch, sample, num_steps=num_steps, start=start)
        lost = (trip.back - trip.state).square(), (trip.data - batch.data).square()
        parts = (*lost, trip.noise, trip.noise.square())
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        count, dimensions = count + len(batch.data), dimensions + batch.data.numel()
        if pictures is not None:
            given, found = (pictures(part).clamp(-1, 1) for part in (batch.data, trip.data))
            ratio += psnr(found, given).sum().item()
            shown = torch.stack([given[:SHOWN], found[:SHOWN]]).cpu() if shown is None else shown
    back, data, mean, square = (sums / dimensions).tolist()
    row: dict[str, Any] = {
        "round_trip_error": math.sqrt(back),
        "data_error": math.sqrt(data),
        "noise_mean": mean,
        "noise_std": math.sqrt(square - mean**2),
        "psnr": None if pictures is None else ratio / count,
    }
    return row, shown
