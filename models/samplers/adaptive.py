"""Jumps as long as a flow map agrees with itself: halved where two half jumps end somewhere else.

    gap = |X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)|,   u = (s + t) / 2,   rms over the numbers of a sample

An exact map has no gap, so the gap tells, without data or teacher, where a jump is too long. A jump with a
gap above `tolerance` becomes two, and the first half is tried next; else the sample goes on from the end of
the two halves, which is known by then. What one sample does depends on no other, up to the rounding of
matrix products, and a network is asked only about samples that are not there yet.

Source: step doubling: Hairer, Norsett and Wanner, "Solving ordinary differential equations I", section II.4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..condition import Condition, take
from ..flow_map import FlowMap


@torch.no_grad()
def adaptive(
    model: FlowMap,
    noise: Tensor,
    *,
    grid: Tensor,
    condition: Condition | None = None,
    tolerance: float = 0.05,
    halvings: float = 6,
    evaluated: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Return the data end; three evaluations a step of `grid`, and five more each time one is halved.

    A step is halved at most `halvings` times in a row, whatever the gap. `evaluated` is called with the
    evaluations (B,) that each sample took.
    """
    if tolerance <= 0 or halvings < 0 or halvings != int(halvings):
        raise ValueError(
            f"tolerance is {tolerance} and halvings {halvings}, expected a positive number (the gap that is "
            "allowed, in units of the samples) and a whole number from 0"
        )
    # Places on the grid cut into units, the finest half jumps; a jump is the `size` units from `place`.
    unit = 2 ** (int(halvings) + 1)
    times = _cut(grid, unit)
    x, whole = noise.clone(), torch.empty_like(noise)
    place = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    size, known = torch.full_like(place, unit), torch.zeros_like(place, dtype=torch.bool)
    evaluations = torch.zeros_like(place)

    def jumped(rows: Tensor, state: Tensor, start: Tensor, end: Tensor) -> Tensor:
        evaluations[rows] += 1
        s, t = times[start].to(x.dtype), times[end].to(x.dtype)
        return model.jump(state, s, t, take(condition, rows))

    while len(rows := (place < len(times) - 1).nonzero()[:, 0]):
        if len(new := rows[~known[rows]]):
            whole[new] = jumped(new, x[new], place[new], place[new] + size[new])
        start, end = place[rows], place[rows] + size[rows]
        middle = (start + end) // 2
        half = jumped(rows, x[rows], start, middle)
        both = jumped(rows, half, middle, end)
        gap = (both - whole[rows]).flatten(1).square().mean(1).sqrt()
        fine = (gap <= tolerance) | (size[rows] == 2)
        done, again = rows[fine], rows[~fine]
        x[done], place[done], known[done] = both[fine], end[fine], False
        # What waits after a jump is as long as the largest power of two that divides its place.
        size[done] = (end[fine] & -end[fine]).clamp(max=unit)
        whole[again], known[again] = half[~fine], True
        size[again] //= 2
    if evaluated is not None:
        evaluated(evaluations)
    return x


def _cut(grid: Tensor, unit: int) -> Tensor:
    """Return the times of a grid (N + 1,) with each step cut into `unit` even parts, (N unit + 1,)."""
    share = torch.arange(unit, dtype=grid.dtype, device=grid.device) / unit
    inner = grid[:-1, None] + share * (grid[1:] - grid[:-1])[:, None]
    return torch.cat([inner.flatten(), grid[-1:]])
