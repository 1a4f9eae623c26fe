"""What a person asks of the likelihood, and what a model has for it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..models.backbones.coupling_flow import CouplingFlow
from ..models.bound import Variance
from ..models.continuous_flow import ContinuousFlow
from ..models.denoiser import Denoiser
from ..models.diffflow import DiffFlow
from ..models.flow_map import FlowMap
from ..models.neural_flow import LearnedFlow
from ..models.ode_likelihood import Interval, parse_solver
from ..models.schedule import Discrete
from ..trainer.config import ConfigError
from ..trainer.continuous_bound import ContinuousBound
from ..trainer.likelihood import (
    Bound,
    Denoising,
    ExactDensity,
    FlowLikelihood,
    ImportanceWeightedBound,
    Probe,
    usual_probe,
)
from ..trainer.measuring import Measure
from ..trainer.path_bound import PathBound, WeightedPathBound

PATHS = 64  # of the importance-weighted bound
STEPS = 1000  # of a chain along a path that has no steps of its own
TIMES = 64  # of the bound of a learned process
FIRST_TIME = 1e-3  # of the flow of a network that predicts data, whose velocity is infinite at t = 0
MEASURES = ("bound", "iw", "ode", "exact")
PURPOSE = {  # the measures that an option is for
    "steps": ("bound", "iw"),
    "drawn_steps": ("bound",),
    "variance": ("bound", "iw"),
    "paths": ("iw",),
    "solver": ("ode",),
    "probe": ("ode",),
}


@dataclass(frozen=True)
class LikelihoodRequest:
    """What to measure: a run on data, by `measures` of MEASURES; none of them, and None, is a default."""

    run: Path
    data: Path
    measures: tuple[str, ...] = ()
    steps: int | None = None
    drawn_steps: int | None = None
    variance: Variance | None = None
    paths: int | None = None
    solver: str | None = None
    probe: Probe | None = None
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if any(name not in MEASURES for name in self.measures):
            raise ConfigError(
                f"--measures {','.join(self.measures)}: expected some of bound, iw and ode, or exact alone"
            )
        if self.measures:
            self.check_options()
        if self.solver is not None:
            try:
                parse_solver(self.solver)
            except ValueError as error:
                raise ConfigError(f"--{error}") from error

    def check_options(self) -> None:
        """Raise ConfigError for an option that none of the measures heeds."""
        for option, measures in PURPOSE.items():
            if getattr(self, option) is not None and not set(measures) & set(self.measures):
                raise ConfigError(
                    f"--{option.replace('_', '-')} has no effect without the measure "
                    f"{' or '.join(measures)}; add it to --measures, or leave the option out"
                )

    def of(self, model: FlowMap | CouplingFlow) -> "LikelihoodRequest":
        """Return the request with measures that such a model has; ConfigError where it asks for others."""
        has, why = ("bound", "iw", "ode"), "it has a velocity"
        if isinstance(model, CouplingFlow):
            has, why = ("exact",), "its density is known without any solver"
        elif isinstance(model, ContinuousFlow):
            has, why = ("ode",), "it is a flow without noise, so that there is no bound"
        if missing := [name for name in self.measures if name not in has]:
            raise ConfigError(f"--measures {missing[0]}: {self.run} has {', '.join(has)} alone, as {why}")
        found = replace(self, measures=self.measures or tuple(name for name in has if name != "iw"))
        found.check_options()
        return found


def measures_of(request: LikelihoodRequest, model: FlowMap | CouplingFlow, *, pixels: bool) -> list[Measure]:
    """Return what to measure, with everything left open chosen by the model."""
    if isinstance(model, CouplingFlow):
        return [ExactDensity(model)]
    measures = _bounds(request, model, pixels=pixels)
    if "ode" in request.measures:
        probe = request.probe or usual_probe(model.sample_shape)
        solver = parse_solver(request.solver or "dopri5:1e-5")
        measures.append(FlowLikelihood(model, solver, probe, interval=interval_of(model), pixels=pixels))
    return measures


def interval_of(model: FlowMap) -> Interval:
    """Return the times between which the flow of a model is followed."""
    first = model.path.on_grid(torch.zeros(1, dtype=torch.float64)).item()
    if isinstance(model, Denoiser) and model.prediction == "data":
        first = max(first, FIRST_TIME)
    return first, 1.0


def _bounds(request: LikelihoodRequest, model: FlowMap, *, pixels: bool) -> list[Measure]:
    """Return the bounds to measure: of a chain, or of a learned process."""
    if isinstance(model, ContinuousFlow):
        return []
    if isinstance(model, LearnedFlow):
        return _bound_of_process(request, model, pixels=pixels)
    if isinstance(model, DiffFlow):
        return _bounds_of_paths(request, model, pixels=pixels)
    measures: list[Measure] = []
    own = model.path.num_steps if isinstance(model.path, Discrete) else None
    steps = request.steps or own or STEPS
    if own is not None and steps > own:
        raise ConfigError(f"--steps {steps}: the path of {request.run} has only {own} steps of its own")
    if request.drawn_steps is not None and request.drawn_steps >= steps:
        raise ConfigError(
            f"--drawn-steps {request.drawn_steps} of a chain of {steps} steps; leave it out to compute all"
        )
    # Each is right for the limit that its data are nearer to: known values, and a Gaussian (Ho et al., 3.2).
    variance = request.variance or ("fixed_small" if pixels else "fixed_large")
    denoising = Denoising(model, steps, variance=variance, pixels=pixels)
    if "bound" in request.measures:
        measures.append(Bound(denoising, request.drawn_steps))
    if "iw" in request.measures:
        measures.append(ImportanceWeightedBound(denoising, request.paths or PATHS))
    return measures


def _bounds_of_paths(request: LikelihoodRequest, model: DiffFlow, *, pixels: bool) -> list[Measure]:
    """Return the bounds of a learned drift, whose paths are simulated as a whole."""
    for option, why in (
        ("variance", "steps back have the variance that was trained"),
        ("drawn_steps", "paths are simulated as a whole"),
    ):
        if getattr(request, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} has no effect on {request.run}: {why}; leave it out"
            )
    steps = request.steps or model.num_steps
    kinds: dict[str, Measure] = {
        "bound": PathBound(model, steps, pixels=pixels),
        "iw": WeightedPathBound(model, steps, request.paths or PATHS, pixels=pixels),
    }
    return [measure for name, measure in kinds.items() if name in request.measures]


def _bound_of_process(request: LikelihoodRequest, model: LearnedFlow, *, pixels: bool) -> list[Measure]:
    """Return the bound of a learned process, which has no chain of steps and no weights of its paths."""
    for option in ("steps", "variance"):
        if getattr(request, option) is not None:
            raise ConfigError(
                f"--{option}: {request.run} has a continuous process, no chain of steps; leave it out, and "
                "set --drawn-steps for more or fewer times"
            )
    if "iw" in request.measures:
        raise ConfigError(
            f"--measures iw: the bound of {request.run} is an integral over continuous time, and its paths "
            "have no importance weights; take bound, or ode"
        )
    times = request.drawn_steps or TIMES
    return [ContinuousBound(model, times, pixels=pixels)] if "bound" in request.measures else []
