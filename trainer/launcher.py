"""What started the processes of a run, read from the environment without torch.

    torchrun, accelerate launch, deepspeed   set RANK, WORLD_SIZE and the address where processes meet
    srun                                     sets SLURM_*, from which the same is made here

One inside another, such as torchrun in srun, is what the innermost one says.
"""

import os
import re
import warnings
from dataclasses import dataclass

FIRST_PORT, NUM_PORTS = 15_000, 15_000  # below those that Linux gives out itself
_ACCELERATE = {  # what `accelerate launch` may have been told, and the key that says it here
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "strategy.name: zero2"),
    "ACCELERATE_USE_FSDP": ("FSDP", "strategy.name: fsdp"),
}


@dataclass(frozen=True)
class Launcher:
    """What started this process, and how many there are of it."""

    name: str | None
    size: int


def launcher() -> Launcher:
    """Return what started this process; where that was srun, set RANK and all that belongs to it."""
    names = os.environ
    tasks = names.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in names and int(tasks) > 1:
        names.update(_meeting_point_of_srun())
    size = int(names.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in names:
        _check_accelerate()
        return Launcher("accelerate launch", size)
    if "WORLD_SIZE" not in names:
        _warn_of_tasks_left_out()
        return Launcher(None, 1)
    for name, mark in (("torchrun", "TORCHELASTIC_RUN_ID"), ("deepspeed", "CROSS_RANK")):
        if mark in names:
            return Launcher(name, size)
    return Launcher("srun" if int(tasks) == size > 1 else "RANK and WORLD_SIZE", size)


def _meeting_point_of_srun() -> dict[str, str]:
    """Return the variables that torchrun would have set, from those of srun."""
    names = os.environ
    job, step = int(names["SLURM_JOB_ID"]), int(names.get("SLURM_STEP_ID", "0"))
    tasks = names.get("SLURM_STEP_TASKS_PER_NODE", "1")
    found = {
        "RANK": names["SLURM_PROCID"],
        "WORLD_SIZE": names["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": names["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_here(tasks, int(names.get("SLURM_NODEID", "0"))),
        "MASTER_ADDR": first_host(names["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (31 * job + step) % NUM_PORTS),
    }
    return {name: names.get(name, value) for name, value in found.items()}


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of nodes, such as n[03-05,9] or a1,b2."""
    whole = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert whole is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", whole.group())


def _tasks_here(tasks: str, node: int) -> str:
    """Return the number for a node in Slurm's list of numbers, such as 2(x3),1 for 2, 2, 2, 1."""
    numbers: list[str] = []
    for part in tasks.split(","):
        number, _, times = part.removesuffix(")").partition("(x")
        numbers += [number] * int(times or 1)
    return numbers[min(node, len(numbers) - 1)]


def _warn_of_tasks_left_out() -> None:
    """Tell of a job of many tasks of which only this one was started."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_NUM_TASKS" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        warnings.warn(
            f"this job of Slurm has {tasks} tasks, but this is one process that no launcher started; put "
            "srun before the command",
            stacklevel=3,
        )


def _check_accelerate() -> None:
    """Raise ValueError where `accelerate launch` was told what only a config says here."""
    for name, (asked, key) in _ACCELERATE.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate launch was told to use {asked} ({name}), which has no effect here: say it "
                f"in the config by {key}, and leave it out there"
            )
    precision = os.environ["ACCELERATE_MIXED_PRECISION"]
    if precision != "no":
        raise ValueError(
            f"accelerate launch was told --mixed_precision {precision}, which has no effect here: set "
            f"training.precision in the config, and give --mixed_precision no"
        )
