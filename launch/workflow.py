"""Workflows: several commands, each with its own resources, that wait for each other.

    folder: runs/mine                       # by default runs/NAME of the file
    resources: {partition: main, time: "4:00:00"}          # of every stage, beneath its own
    stages:
      pretrain:
        run: train teacher.yaml             # a driftmap command; a run's folder is FOLDER/STAGE
        resources: {nodes: 2}
      distil:
        after: pretrain                     # or a list; it starts when they have ended well
        run: train flow-map.yaml teacher.run={pretrain} model.from_run={pretrain}
      publish:
        after: distil
        run: export {distil} {folder}/pipeline

`{STAGE}` is what an earlier stage makes: a run folder, shards, a file. All is checked before anything is
queued. A stage whose result is whole, and newer than those of the stages it comes after, is left out. Stages
that train have their jobs.jsonl in the run's folder, the others in FOLDER/stages/STAGE.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from ..trainer.config import FORBID, ConfigError, checked, nearest, read_config
from .jobs import jobs_of
from .stage import Made, made_by

_NAME = re.compile(r"[A-Za-z][\w-]*")
_OWN_NAMES = ("folder", "jobs", "snapshots", "stages")
_REFERENCE = re.compile(r"\{([A-Za-z][\w-]*)\}")  # not {000..099} and not {name: x}


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@checked_dataclass(frozen=True, config=FORBID)
class StageSection:
    """One stage as it is written: a driftmap command, the stages that it waits for, what it asks for."""

    run: str
    after: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    resources: dict[str, Any] = Field(default_factory=dict)


@checked_dataclass(frozen=True, config=FORBID)
class WorkflowSection:
    """A workflow file as it is written."""

    stages: Annotated[dict[str, Any], Field(min_length=1)]
    folder: Path | None = None
    resources: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be started: the words of its command, its folder, what it makes and asks for."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...]
    folder: Path
    made: Made
    resources: dict[str, Any]

    @property
    def time(self) -> float | None:
        """When what this very command makes was whole; None where it is not, or another command made it."""
        jobs = jobs_of(self.folder)
        # Of what trains, the recipe tells more: which settings may change.
        other = self.words[0] != "train" and bool(jobs) and jobs[-1].command != self.words
        return None if other else self.made.time


@dataclass(frozen=True)
class Workflow:
    """Stages in an order in which each comes after all that it waits for, and the folder of theirs."""

    folder: Path
    stages: tuple[Stage, ...]

    @property
    def missing(self) -> list[Stage]:
        """The stages whose result is not whole, older than what it was made from, or about to be."""
        times: dict[str, float | None] = {}
        for stage in self.stages:
            before = [times[name] for name in stage.after]
            own = stage.time
            current = own is not None and all(time is not None and time <= own for time in before)
            times[stage.name] = own if current else None
        return [stage for stage in self.stages if times[stage.name] is None]


def is_workflow(file: Path) -> bool:
    """Return whether a YAML file is a workflow, not the config of a run."""
    return "stages" in read_config(file)


def read_workflow(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
    resources: dict[str, Any] | None = None,
) -> Workflow:
    """Return the checked workflow of a file; `folder` and `resources` here stand above the file's own.

    Raises ConfigError naming stage and key.
    """
    section = checked(WorkflowSection, read_config(file, overrides), place="")
    written = {
        name: checked(StageSection, stage, place=f"stages.{name}") for name, stage in section.stages.items()
    }
    shared = {**section.resources, **(resources or {})}
    place = folder or section.folder or Path("runs") / file.stem
    stages: dict[str, Stage] = {}
    for name in _ordered(written):
        stage = _stage(name, written, place, made={other: stages[other].made for other in stages})
        twin = next((other for other in stages if stages[other].made.place == stage.made.place), None)
        if twin is not None:
            raise ConfigError(
                f"stages.{name}.run: it writes {stage.made.place}, as the stage {twin!r} does; "
                "let it write elsewhere"
            )
        stages[name] = replace(stage, resources={**shared, **stage.resources})
    return Workflow(place, tuple(stages.values()))


def _ordered(stages: dict[str, StageSection]) -> list[str]:
    """Return the names in an order in which each comes after all that it waits for."""
    for name, stage in stages.items():
        if not _NAME.fullmatch(name) or name in _OWN_NAMES:
            names = ", ".join(_OWN_NAMES)
            raise ConfigError(
                f"stages.{name}: a stage's name is of letters, digits, - and _, and none of {names}"
            )
        for other in stage.after:
            if other not in stages or other == name:
                others = [known for known in stages if known != name]
                raise ConfigError(f"stages.{name}.after: no such stage {other!r}{nearest(other, others)}")
    try:
        return list(TopologicalSorter({name: stage.after for name, stage in stages.items()}).static_order())
    except CycleError as error:
        circle = error.args[1]
        raise ConfigError(
            f"stages.{circle[0]}.after: {' -> '.join(circle)} wait for each other; remove one of them"
        ) from error


def _stage(name: str, stages: dict[str, StageSection], folder: Path, *, made: dict[str, Made]) -> Stage:
    """Return one stage with its references replaced, and its own resources only."""
    written, place = stages[name], f"stages.{name}.run"
    places = {other: str(made[other].place) for other in _before(name, stages)}
    places["folder"] = str(folder)

    def replaced(match: re.Match[str]) -> str:
        if match[1] in places:
            return places[match[1]]
        if match[1] in stages and match[1] != name:
            raise ConfigError(f"{place}: {match[0]} stands in it; set stages.{name}.after to {match[1]!r}")
        raise ConfigError(f"{place}: {match[0]} is no earlier stage{nearest(match[1], places)}")

    try:
        words = [_REFERENCE.sub(replaced, word) for word in shlex.split(written.run)]
    except ValueError as error:
        raise ConfigError(f"{place}: {error} in {written.run!r}") from error
    if words[:1] == ["driftmap"]:
        raise ConfigError(f"{place}: leave out the word driftmap; found {written.run!r}")
    if words[:1] == ["train"]:
        if any(word.split("=")[0] == "--out" for word in words):
            raise ConfigError(f"{place}: the folder of this run is {folder / name}; remove --out")
        words += ["--out", str(folder / name)]
    own = folder / name if words[:1] == ["train"] else folder / "stages" / name
    return Stage(name, tuple(words), written.after, own, made_by(words, place=place), written.resources)


def _before(name: str, stages: dict[str, StageSection]) -> set[str]:
    """Return all stages that a stage comes after, over others, too."""
    found: set[str] = set()
    waiting = list(stages[name].after)
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += stages[other].after
    return found
