"""How far jumps agree with each other, by source and target; the even grid whose shift suits them best.

    semigroup gap   |X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)|,  u = (s + t) / 2
    round trip      |X_{t,s}(X_{s,t}(x)) - x|

root mean squares over samples and their numbers, at states x = alpha(s) data + sigma(s) noise. Both are 0
for a flow map, whatever the data: they say where a jump is too long, and at t > s whether a network has
learned to invert. The shift is searched by the distance of the samples to the teacher's from the same noise;
of two steps, every time u between them is the even grid's with the shift u / (1 - u).
"""

import torch
from torch import Tensor

from ..models.condition import Condition
from ..models.flow_map import FlowMap
from ..models.samplers import jump, time_grid

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MIDDLES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # what is tried as the time between two steps


def rms(difference: Tensor) -> float:
    """Return the root mean square of all numbers."""
    return difference.double().square().mean().sqrt().item()


@torch.no_grad()
def agreement(
    model: FlowMap, data: Tensor, noise: Tensor, condition: Condition | None = None
) -> dict[str, list]:
    """Return `times`, and by source and target `semigroup_gap` and `round_trip`, 0 where they are the same.

    The noise (B, ...) is to be independent of the data (B, ...).
    """
    gaps, trips = [], []
    for source in TIMES:
        s = torch.full((len(data),), source, dtype=data.dtype, device=data.device)
        x = model.path.state(data, noise, s)
        row = [
            (0.0, 0.0) if source == target else _errors(model, x, s, target, condition) for target in TIMES
        ]
        gaps.append([gap for gap, _ in row])
        trips.append([trip for _, trip in row])
    return {"times": list(TIMES), "semigroup_gap": gaps, "round_trip": trips}


def _errors(
    model: FlowMap, x: Tensor, s: Tensor, target: float, condition: Condition | None
) -> tuple[float, float]:
    """Return the semigroup gap and the round-trip error of the jump from s to the target."""
    t = torch.full_like(s, target)
    u = (s + t) / 2
    there = model.jump(x, s, t, condition)
    halves = model.jump(model.jump(x, s, u, condition), u, t, condition)
    return rms(halves - there), rms(model.jump(there, t, s, condition) - x)


@torch.no_grad()
def best_shift(
    model: FlowMap, noise: Tensor, ends: Tensor, num_steps: int, condition: Condition | None = None
) -> dict[str, float | list[float]]:
    """Return the shift of the grid whose jumps from noise end nearest to `ends` (B, ...), by rms.

    With it its grid, its error, and that of the even grid.
    """
    errors = {}
    for middle in MIDDLES:
        shift = middle / (1 - middle)
        grid = time_grid(num_steps, shift=shift, device=noise.device)
        errors[shift] = rms(jump(model, noise, grid=grid, condition=condition) - ends)
    best = min(errors, key=errors.__getitem__)
    grid = time_grid(num_steps, shift=best).tolist()
    return {"shift": best, "grid": grid, "error": errors[best], "even_error": errors[1.0]}
