"""A study: methods on data sets, as a config says it, and the recipe of each training that it asks for.

The form of a config is shown in launch/compare.py. A method is a recipe without its data, whose sections
stand key by key above those that all methods share; what it is measured by are two sections more.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ..data.shards import ShardSet
from ..data.synthetic import SETS
from .config import ConfigError, checked, merged, nearest
from .data_section import Positive
from .objective import STRICT
from .recipe import Recipe, objective_name, recipe_from

# Measures of likelihood by objective, where not all of a chain and its flow have a meaning.
MEASURES = {
    "continuous_flow": ("ode",),
    "discrete_flow": ("exact",),
    "neural_flow": ("bound", "ode"),
}
WITHOUT_STEPS = ("neural_flow",)
NAME = re.compile(r"[A-Za-z0-9][\w-]*")  # of a set or a method: a folder, and a key of an override
Steps = Annotated[tuple[Positive, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class SetSection:
    """A point set by its name, drawn anew to train and to test, or shards and held-out shards."""

    points: str | None = None
    num_train: Positive | None = None  # of points; None: 100,000
    num_test: Positive | None = None  # 10,000
    shards: Path | None = None
    held_out: Path | None = None

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        if (self.points is None) == (self.shards is None):
            raise ValueError("one of points and shards is needed, and no more")
        if (self.shards is None) != (self.held_out is None):
            raise ValueError("shards to train on need held_out shards to test on, and no other set does")
        if self.points is not None and self.points not in SETS:
            raise ValueError(f"there is no point set {self.points!r}{nearest(self.points, SETS)}")
        if self.points is None and (self.num_train or self.num_test):
            raise ValueError(
                "num_train and num_test are of points, and have no effect on shards; remove them"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Budget:
    """What a training may cost: the samples that it sees."""

    samples: Positive

    def steps(self, batch_size: int) -> int:
        """Return how many steps of a training it pays, one at least."""
        return math.ceil(self.samples / batch_size)


@dataclass(frozen=True, config=STRICT)
class LikelihoodSection:
    """What of the likelihood is measured, as `driftmap likelihood` does; a measure has columns of its own.

    `exact` is the density of a discrete flow, which has no other. `steps` of a chain None: one bound, with
    the steps that are the model's own.
    """

    measures: Annotated[tuple[Literal["bound", "iw", "ode", "exact"], ...], Field(min_length=1)] = (
        "bound",
        "ode",
    )
    bound_steps: Steps | None = None
    iw_steps: Steps | None = None
    paths: Positive = 16
    solver: str = "dopri5:1e-5"


@dataclass(frozen=True, config=STRICT)
class SamplingSection:
    """By which samplers, and in how many steps; a discrete flow has none of either."""

    samplers: tuple[str, ...] = ("euler",)
    steps: Steps = (5, 10, 30, 100)


@dataclass(frozen=True, config=STRICT)
class MethodSection:
    """A method: the sections of its recipe, its own budget if it has one, and how it is measured."""

    objective: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any] = Field(default_factory=dict)
    ema: dict[str, Any] = Field(default_factory=dict)
    budget: Budget | None = None
    likelihood: LikelihoodSection = Field(default_factory=LikelihoodSection)
    sampling: SamplingSection = Field(default_factory=SamplingSection)

    @model_validator(mode="after")
    def _steps_are_the_budgets(self) -> Self:
        if "steps" in self.training:
            raise ValueError("training.steps follows from the budget; remove it, and set budget")
        if {"shards", "mixture"} & set(self.data):
            raise ValueError("data.shards follows from the set; remove it, and name the set in sets")
        if "from_run" in self.model:
            raise ValueError("model.from_run: in a study all methods start anew; give the network itself")
        return self


@dataclass(frozen=True, config=STRICT)
class Study:
    """A whole config; sets and methods by their names."""

    sets: dict[str, Any]
    methods: dict[str, Any]
    budget: Budget
    shared: dict[str, Any] = Field(default_factory=dict)
    size_tolerance: Annotated[float, Field(ge=0)] = 0.1
    num_samples: Annotated[int, Field(ge=10)] = 4000  # that are generated, and of test data to compare with
    neighbours: Positive = 10  # of a latent, whose classes are compared with its own
    density_side: Positive = 96  # cells of a side of the plane whose density is drawn
    seed: Annotated[int, Field(ge=0)] = 0


def study_from(settings: dict[str, Any]) -> Study:
    """Return the checked study of a config's settings; its sets and methods are sections by their names.

    Raises ConfigError at the first section with mistakes, and where no recipe can be made of a method.
    """
    study = checked(Study, settings, place="")
    given = {name: section for name, section in study.sets.items() if section is not None}
    sets = {name: checked(SetSection, section, place=f"sets.{name}") for name, section in given.items()}
    methods: dict[str, MethodSection] = {}
    for name, section in study.methods.items():
        if section is not None:
            if not isinstance(section, dict):
                raise ConfigError(f"methods.{name}: found {section!r}, expected sections such as objective")
            own = merged(study.shared, section)
            methods[name] = checked(MethodSection, own, place=f"methods.{name}")
    for kind, names in (("sets", sets), ("methods", methods)):
        if not names:
            raise ConfigError(f"{kind}: there are none; a study needs one at least")
        odd = [name for name in names if not NAME.fullmatch(name)]
        if odd:
            raise ConfigError(f"{kind}.{odd[0]}: a name is a folder, too: letters, digits, _ and - alone")
    study = replace(study, sets=sets, methods=methods)
    for name, method in methods.items():
        recipe = recipe_of(study, name, method, shards=Path("shards"), steps=10**9)
        _check_measures(name, method.likelihood, objective_name(recipe.objective))
    return study


def _check_measures(name: str, likelihood: LikelihoodSection, objective: str) -> None:
    """Raise ConfigError where a model of an objective has no such measure, before anything is trained."""
    has = MEASURES.get(objective, ("bound", "iw", "ode"))
    place = f"methods.{name}.likelihood"
    if odd := [measure for measure in likelihood.measures if measure not in has]:
        raise ConfigError(
            f"{place}.measures: {odd[0]!r} has no meaning for {objective}; take {' and '.join(has)}"
        )
    for measure, steps in (("bound", likelihood.bound_steps), ("iw", likelihood.iw_steps)):
        if steps and measure in likelihood.measures and objective in WITHOUT_STEPS:
            raise ConfigError(
                f"{place}.{measure}_steps: {objective} has a continuous process, no chain of steps; set it "
                "to null"
            )


def recipe_of(
    study: Study, name: str, method: MethodSection, *, shards: ShardSet | Path, steps: int
) -> Recipe:
    """Return the recipe that trains a method on shards; `model.channels` is the number of their columns.

    Raises ConfigError with the method in its place.
    """
    known = isinstance(shards, ShardSet)
    model = method.model
    if known and "channels" not in model:
        model = {**model, "channels": shards.info["dimensions"]}
    settings = {
        "data": {**method.data, "shards": str(shards.folder if known else shards)},
        "model": model,
        "objective": method.objective,
        "optimizer": method.optimizer,
        "training": {"save_every": max(1, min(1000, steps // 4)), **method.training, "steps": steps},
        "ema": method.ema,
        "seed": study.seed,
    }
    try:
        return recipe_from(settings)
    except ConfigError as error:
        raise ConfigError("\n".join(f"methods.{name}.{line}" for line in str(error).splitlines())) from error


def check_sizes(sizes: dict[str, int], tolerance: float, *, where: str) -> None:
    """Raise ConfigError where the numbers of parameters by method differ by more than a share."""
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[large] > (1 + tolerance) * sizes[small]:
        raise ConfigError(
            f"methods.{large}.model: {sizes[large]:,} trained parameters on {where}, but {small} has "
            f"{sizes[small]:,}, and size_tolerance is {tolerance:g}; change a width, or raise size_tolerance"
        )
