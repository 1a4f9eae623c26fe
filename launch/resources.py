"""What a job asks for, checked: on Slurm, on this machine, or in this process."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from ..trainer.config import FORBID

Positive = Annotated[int, Field(ge=1)]


def minutes_of(time: Any) -> int:
    """Return the minutes of a time as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    text = str(time)
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if form is None:
        raise ValueError(f"{text!r} is no time; give minutes, H:M:S or D-H:M:S, such as 90 or 1-12:00:00")
    days, *rest = form.groups()
    parts = [int(part) for part in rest if part is not None]
    # Of two parts without days the last is seconds, of one it is minutes.
    places = (60, 1, 1 / 60)[: len(parts)] if days or len(parts) == 3 else (1, 1 / 60)
    sums = sum(part * place for part, place in zip(parts, places, strict=False))
    minutes = math.ceil(1440 * int(days or 0) + sums)
    if minutes < 1:
        raise ValueError(f"{text!r} is no time to run; give at least a minute")
    return minutes


@checked_dataclass(frozen=True, config=FORBID)
class Resources:
    """What a job asks for, and what its script does first; times in minutes or as Slurm writes them."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    nodes: Positive = 1
    min_nodes: Positive | None = None  # it starts, or goes on after a node died, on so few
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: Positive | None = None  # by default one a GPU, at least one
    cpus_per_task: Positive | None = None
    partition: str | None = None
    time: Annotated[int, BeforeValidator(minutes_of)] = 60
    save_before: Annotated[int, Field(ge=1)] = 120  # seconds before the end of the time
    sbatch: tuple[str, ...] = ()  # more options of sbatch, such as account=mine or exclusive
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # lines of the job's script
    env: tuple[str, ...] = ()  # NAME=VALUE
    container: str | None = None  # for pyxis
    container_mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        if self.cluster != "slurm":
            only = ("min_nodes", "partition", "sbatch", "modules", "container", "container_mounts")
            given = [name for name in only if getattr(self, name)]
            given += ["nodes"] if self.nodes > 1 else []
            if given:
                raise ValueError(f"{', '.join(given)}: without effect on cluster {self.cluster!r}; remove it")
        for pair in self.env:
            if not re.match(r"[A-Za-z_]\w*=", pair):
                raise ValueError(f"env: {pair!r} is not of the form NAME=VALUE")
        if self.container_mounts and self.container is None:
            raise ValueError("container_mounts: without effect where no container is given; remove it")

    @property
    def tasks_a_node(self) -> int:
        """How many processes run on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def tasks(self) -> int:
        """How many processes run at most."""
        return self.nodes * self.tasks_a_node
