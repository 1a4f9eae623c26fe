"""Where points go in a model: forward from data, back from noise, and the density of the plane."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models.backbones.coupling_flow import CouplingFlow
from ..models.continuous_flow import ContinuousFlow
from ..models.diffflow import DiffFlow
from ..models.flow_map import FlowMap, Process
from ..models.ode_likelihood import log_density, parse_solver
from ..models.samplers import heun, sampler_of
from ..trainer.seeds import Random
from .likelihood_request import interval_of

PANELS = 5  # of a path between data and noise, both included
FLOW_STEPS = 25  # of Heun's method between two panels
MARGIN = 1.15  # how much further than the data a picture reaches
AT_ONCE = 4096


@torch.no_grad()
def process_states(model: FlowMap, data: Tensor, *, seed: int) -> Tensor | None:
    """Return states (PANELS, B, ...) of the process that a model reverses; None where it has only a flow."""
    if isinstance(model, ContinuousFlow):
        return None
    draw = partial(Random(seed, torch.arange(len(data))).normal, shape=tuple(data.shape[1:]))
    states = []
    for place in range(PANELS):
        t = torch.full((len(data),), place / (PANELS - 1))
        if isinstance(model, Process):
            states.append(model.state(data, t, draw=draw))
        else:
            states.append(model.path.state(data, draw("noise"), t))
    return torch.stack(states)


@torch.no_grad()
def flow_states(model: FlowMap, data: Tensor, *, seed: int) -> Tensor:
    """Return states (PANELS, B, ...) of the flow, from its first time to 1."""
    first, last = interval_of(model)
    cuts = torch.linspace(first, last, PANELS, dtype=torch.float64)
    states = [data]
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        grid = torch.linspace(float(start), float(end), FLOW_STEPS + 1, dtype=torch.float64)
        states.append(heun(model, states[-1], grid=grid))
    return torch.stack(states)


def backward_states(
    model: FlowMap, noise: Tensor, name: str, steps: int, *, draw: Callable[[int], Tensor]
) -> Tensor:
    """Return states (PANELS, B, ...) of a sampler of so many steps, noise first and samples last."""
    whole = sampler_of(name, path=model.path_of_states, draw=draw).grid(steps)
    if isinstance(model, DiffFlow) and name == "backward":
        whole = model.grid(steps).flip(0)
    cuts = [round(place * steps / (PANELS - 1)) for place in range(PANELS)]
    states = [noise]
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        if start == end:
            states.append(states[-1])
            continue
        sampler = sampler_of(
            name, path=model.path_of_states, draw=lambda step, first=start: draw(first + step)
        )
        states.append(sampler.sample(model, states[-1], grid=whole[start : end + 1]))
    return torch.stack(states)


def grid_of(points: Tensor) -> float:
    """Return how far from the origin a picture of these points reaches."""
    return MARGIN * points.abs().max().item()


def density_on(model: FlowMap | CouplingFlow, reach: float, side: int, *, solver: str) -> Tensor:
    """Return p (side, side) at the middles of the cells of [-reach, reach]^2, rows from the top."""
    return in_cells(partial(_log_density, model, solver=solver), reach, side)


def in_cells(log_p: Callable[[Tensor], Tensor], reach: float, side: int) -> Tensor:
    """Return exp(log_p) (side, side) at the middles of cells, `log_p` being of points (N, 2)."""
    middle = (torch.arange(side) + 0.5) / side * 2 * reach - reach
    places = torch.cartesian_prod(-middle, middle).flip(1)
    return torch.cat([log_p(part).exp() for part in places.split(AT_ONCE)]).reshape(side, side).float()


@torch.no_grad()
def _log_density(model: FlowMap | CouplingFlow, points: Tensor, *, solver: str) -> Tensor:
    if isinstance(model, CouplingFlow):
        return model.log_density(points)
    found, _ = log_density(
        model, points, probe=None, solver=parse_solver(solver), interval=interval_of(model)
    )
    return found
