"""From noise at t = 1 to data at t = 0: one file per method, with its formula and source.

    steps.py       grids of times; the end points that a velocity means
    jump.py        a flow map's jumps; gamma.py: with noise between them; adaptive.py: as many as it takes
    euler.py  heun.py                    the flow's equation, on any path
    ddim.py  dpm_solver.py               the same, exact in all but the data predicted
    ddpm.py  edm.py                      with noise at each step
    backward.py                          the chain of a learned drift
    scheduler.py   any scheduler of diffusers

All take a velocity (a flow map, a guided one), the noise of each sample and a grid of times. What is drawn on
the way comes from `draw`, keyed by the sample, so that a picture is the same from any number of processes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..path import Path
from .adaptive import adaptive
from .backward import backward
from .ddim import ddim
from .ddpm import ddpm
from .dpm_solver import dpm_solver
from .edm import edm
from .euler import euler
from .gamma import gamma
from .heun import heun
from .jump import jump
from .scheduler import scheduler
from .steps import Draw, noise_grid, time_grid

__all__ = [
    "SAMPLERS",
    "Draw",
    "Sampler",
    "adaptive",
    "backward",
    "ddim",
    "ddpm",
    "dpm_solver",
    "edm",
    "euler",
    "gamma",
    "heun",
    "jump",
    "noise_grid",
    "sampler_of",
    "scheduler",
    "time_grid",
]

METHODS = (jump, euler, heun, ddim, ddpm, dpm_solver, edm, gamma, adaptive, backward)
SAMPLERS = {method.__name__: method for method in METHODS}
EVALUATIONS = {"heun": 2, "edm": 2, "adaptive": 3}  # a step; of adaptive one that is not halved
OF_DIFFUSERS = "diffusers:"
GIVEN = {"model", "noise", "grid", "condition", "path", "draw", "evaluated"}  # what is no setting


@dataclass(frozen=True)
class Sampler:
    """A method ready to be called as `sample(model, noise, grid=, condition=)`, with its usual grid."""

    sample: Callable[..., Tensor]
    grid: Callable[[int], Tensor]  # of a number of steps
    evaluations: int = 1  # a step; of a scheduler of diffusers as it says nothing of them
    jumps: bool = False  # asks a flow map for jumps, which no guidance of velocities changes


def sampler_of(
    text: str, *, path: Path | None, draw: Draw, evaluated: Callable[[Tensor], object] | None = None
) -> Sampler:
    """Return the sampler of a text such as `heun`, `edm:churn=40` or `diffusers:UniPCMultistepScheduler`.

    One that chooses its number of evaluations calls `evaluated` with that of each sample (B,). Without a path
    there are those that ask for velocities or jumps alone.

    Raises ValueError where there is no such sampler or setting.
    """
    if path is None and not _needs_no_path(text):
        alone = ", ".join(filter(_needs_no_path, SAMPLERS))
        raise ValueError(
            f"the sampler {text} goes along a path, and this model has a process of its own; take {alone}"
        )
    if text.startswith(OF_DIFFUSERS):
        assert path is not None
        name = text.removeprefix(OF_DIFFUSERS)
        return Sampler(partial(scheduler, name=name, path=path), time_grid)
    name, _, written = text.partition(":")
    if name not in SAMPLERS:
        raise ValueError(
            f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)}, and diffusers' schedulers as "
            "diffusers:NAME"
        )
    method = SAMPLERS[name]
    takes = inspect.signature(method).parameters
    at_hand: dict[str, Any] = {"path": path, "draw": draw, "evaluated": evaluated}
    given = {key: value for key, value in at_hand.items() if key in takes}
    known = {key: takes[key].default for key in takes if key not in GIVEN}
    settings = dict(_setting(part, name, known) for part in written.split(",") if part)
    grid = partial(noise_grid, path=path) if method is edm and path is not None else time_grid
    jumps = method in (jump, gamma, adaptive)
    return Sampler(partial(method, **given, **settings), grid, EVALUATIONS.get(name, 1), jumps)


def _needs_no_path(text: str) -> bool:
    method = SAMPLERS.get(text.partition(":")[0])
    return method is not None and "path" not in inspect.signature(method).parameters


def _setting(text: str, name: str, known: dict[str, Any]) -> tuple[str, Any]:
    """Return key and value of a setting such as churn=40; `known` has the defaults."""
    key, equals, value = text.partition("=")
    if key not in known or not equals:
        choices = (
            f"its settings are {', '.join(sorted(known))}, as in {name}:key=value" if known else "it has none"
        )
        raise ValueError(f"sampler {name}: no such setting {text!r}; {choices}")
    try:
        return key, float(value)
    except ValueError:
        if not isinstance(known[key], str):
            raise ValueError(f"sampler {name}: {key} is {value!r}, expected a number") from None
        return key, value
