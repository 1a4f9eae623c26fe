"""Jobs through submitit: one process a task by srun, on Slurm; on this machine; or in this process.

A Slurm job that has not ended by its own will is requeued by its script, after the last process has ended and
only while Slurm calls it running, so that no cancelled job comes back; then the same command goes on from the
run's last checkpoint. Nothing is requeued from inside a process: a container has no scontrol.

Not requeued is what ended by a mistake, what hung, what failed without a new checkpoint, and what was killed
or lost a process more than FRUITLESS_RESTARTS times in a row without one.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from ..trainer.signals import TOLD, ExitCode
from .jobs import Job, add_job
from .resources import Resources
from .worker import Worker

FRUITLESS_RESTARTS = 3


@dataclass(frozen=True)
class Work:
    """A `driftmap` command by its words, and the folder of what it makes."""

    words: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Order:
    """When jobs start: after those of the ids `after` have ended, and well; of several, `at_once` at a time.

    On this machine they start one at a time where `at_once` does not say otherwise.
    """

    after: tuple[str, ...] = ()
    ending_well: bool = True
    at_once: int | None = None


NO_ORDER = Order()


def submit(
    works: Sequence[Work],
    resources: Resources,
    *,
    logs: Path,
    code: Path | None = None,
    order: Order = NO_ORDER,
) -> list[Job]:
    """Queue commands, several as an array, and note each in its folder; `code` goes before PYTHONPATH.

    Raises ValueError in the scheduler's words.
    """
    logs = logs.absolute()
    if resources.cluster == "local" and len(works) > 1:
        return _in_turn(works, resources, logs=logs, code=code, at_once=order.at_once or 1)
    if resources.container is not None and len(works) > 1:  # submitit (1.5) forgets `python` in arrays
        parts = [submit([work], resources, logs=logs, code=code, order=order) for work in works]
        return [job for part in parts for job in part]
    workers = [Worker(work.words) for work in works]
    try:
        executor = _executor(works, resources, logs=logs, code=code, order=order)
        started = [executor.submit(workers[0])] if len(workers) == 1 else executor.map_array(_call, workers)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"Slurm refused the job: {str(error).strip()}") from error
    jobs = [
        Job(
            job_id=made.job_id,
            cluster=resources.cluster,
            command=work.words,
            folder=work.folder,
            logs=logs,
            nodes=resources.nodes,
            tasks=resources.tasks,
            resources=asdict(resources),
            depends_on=order.after,
        )
        for made, work in zip(started, works, strict=True)
    ]
    for job in jobs:
        add_job(job)
    if resources.cluster == "debug":
        for made in started:
            made.result()
    return jobs


def script_of(
    works: Sequence[Work],
    resources: Resources,
    *,
    logs: Path,
    code: Path | None = None,
    order: Order = NO_ORDER,
) -> str:
    """Return the script that `submit` would give to sbatch, or the commands that it would start here."""
    if resources.cluster != "slurm":
        return "\n".join(
            [*_setup(resources, code), *(f"driftmap {shlex.join(work.words)}" for work in works)]
        )
    logs = logs.absolute()
    parameters = _parameters(works, resources, logs=logs, code=code, order=order)
    command = f"{_python(resources)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    count = len(works) if len(works) > 1 else None
    return _make_sbatch_string(command, logs, map_count=count, **parameters)


def _call(worker: Worker) -> None:
    worker()


def _in_turn(
    works: Sequence[Work], resources: Resources, *, logs: Path, code: Path | None, at_once: int
) -> list[Job]:
    """Start local jobs of which each waits for the end of the one `at_once` before it."""
    jobs: list[Job] = []
    for number, work in enumerate(works):
        before = (jobs[number - at_once].job_id,) if number >= at_once else ()
        jobs += submit([work], resources, logs=logs, code=code, order=Order(before, ending_well=False))
    return jobs


def _executor(
    works: Sequence[Work], resources: Resources, *, logs: Path, code: Path | None, order: Order
) -> AutoExecutor:
    """Return submitit's executor with all parameters set."""
    python = {"slurm_python": _python(resources)} if resources.cluster == "slurm" else {}
    try:
        executor = AutoExecutor(logs, cluster=resources.cluster, **python)
    except RuntimeError as error:  # no srun
        raise ValueError(f"{error} To train on this machine, give --cluster local") from error
    if resources.cluster == "slurm":
        parameters = _parameters(works, resources, logs=logs, code=code, order=order)
        executor.update_parameters(**{f"slurm_{name}": value for name, value in parameters.items()})
    else:
        setup = _setup(resources, code)
        if order.after:
            words = [sys.executable, "-m", "driftmap.launch.waiting", str(logs), *order.after]
            setup.append(shlex.join(words if order.ending_well else [*words, "--any"]))
        executor.update_parameters(
            timeout_min=resources.time,
            tasks_per_node=resources.tasks,
            gpus_per_node=resources.gpus_per_node,
            **({"local_setup": setup} if resources.cluster == "local" else {}),
        )
    return executor


def _python(resources: Resources) -> str:
    return "python3" if resources.container is not None else shlex.quote(sys.executable)


def _parameters(
    works: Sequence[Work], resources: Resources, *, logs: Path, code: Path | None, order: Order
) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor."""
    more: dict[str, Any] = {"requeue": True}
    if resources.min_nodes is not None:
        more["nodes"] = f"{resources.min_nodes}-{resources.nodes}"
    if order.after:
        kind = "afterok" if order.ending_well else "afterany"
        # A stage whose forerunner failed would wait for ever.
        more |= {"dependency": f"{kind}:{':'.join(order.after)}", "kill-on-invalid-dep": "yes"}
    for option in resources.sbatch:
        name, equals, value = option.removeprefix("--").partition("=")
        more[name] = value if equals else True
    # Of MIN-MAX nodes, Slurm (22.05) gives only as many as MIN's tasks fill: there srun asks for the tasks.
    a_node = {"ntasks_per_node": resources.tasks_a_node, "cpus_per_task": resources.cpus_per_task}
    if resources.min_nodes is not None:
        a_node = {"cpus_per_task": resources.tasks_a_node * (resources.cpus_per_task or 1)}
    asked = {
        **a_node,
        "gpus_per_node": resources.gpus_per_node or None,
        "partition": resources.partition,
        "array_parallelism": order.at_once,
    }
    return {
        "job_name": works[0].folder.name if len(works) == 1 else works[0].folder.parent.name,
        "nodes": resources.nodes,
        "time": resources.time,
        "signal_delay_s": min(resources.save_before, 30 * resources.time),
        "additional_parameters": more,
        "srun_args": _srun(works, resources),
        "setup": _setup(resources, code) + _before(works, logs),
        "teardown": _AFTER.splitlines(),
        **{name: value for name, value in asked.items() if value is not None},
    }


def _srun(works: Sequence[Work], resources: Resources) -> list[str]:
    """Return the arguments of srun."""
    words = ["--kill-on-bad-exit=1"]  # or the others wait for a process that is gone
    if resources.min_nodes is not None:
        words.append(f"--ntasks-per-node={resources.tasks_a_node}")
    if resources.cpus_per_task is not None or resources.min_nodes is not None:
        # Not taken from sbatch since Slurm 22.05.
        words.append(f"--cpus-per-task={resources.cpus_per_task or 1}")
    if resources.container is not None:
        own = {str(Path.cwd()), *(str(work.folder.absolute()) for work in works)}
        mounts = [*(f"{place}:{place}" for place in sorted(own)), *resources.container_mounts]
        words += [f"--container-image={resources.container}", f"--container-mounts={','.join(mounts)}"]
        words.append(f"--container-workdir={Path.cwd()}")
    return words


def _setup(resources: Resources, code: Path | None) -> list[str]:
    """Return the lines of the job's script that prepare for the command."""
    lines = [f"module load {shlex.quote(name)}" for name in resources.modules]
    lines += resources.setup
    for name, _, value in (pair.partition("=") for pair in resources.env):
        lines.append(f"export {name}={shlex.quote(value)}")
    if code is not None:
        lines.append(f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return lines


def _before(works: Sequence[Work], logs: Path) -> list[str]:
    """Return the lines that note where a run stands when its job starts."""
    folders = " ".join(shlex.quote(str(work.folder.absolute())) for work in works)
    return [
        f"folders=({folders})",
        'newest() { ls -d "${folders[${SLURM_ARRAY_TASK_ID:-0}]}"/checkpoints/step-????????/manifest.json'
        " 2> /dev/null | tail -n 1; }",
        "before=$(newest)",
        f"export {TOLD}={shlex.quote(str(logs))}/$SLURM_JOB_ID.told",
        f'rm -f "${TOLD}"-*',
        f"fruitless={shlex.quote(str(logs))}/$SLURM_JOB_ID.fruitless",
    ]


_AFTER = f"""\
code=$?
case $(cat "${TOLD}"-* 2> /dev/null) in
    *MISTAKE*) code={ExitCode.MISTAKE:d} ;;
    *HUNG*) code={ExitCode.HUNG:d} ;;
    *FAILED*) code={ExitCode.FAILED:d} ;;
    *) [ "$code" != {ExitCode.FAILED:d} ] || code={ExitCode.LOST:d} ;;  # srun's own
esac
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
again() {{
    case $code in {ExitCode.DONE:d} | {ExitCode.MISTAKE:d} | {ExitCode.HUNG:d}) return 1 ;; esac
    if [ "$(newest)" != "$before" ]; then
        rm -f "$fruitless"
        return 0
    fi
    case $code in {ExitCode.FAILED:d}) return 1 ;; {ExitCode.STOPPED:d}) return 0 ;; esac
    echo "$code" >> "$fruitless"
    [ "$(wc -l < "$fruitless")" -le {FRUITLESS_RESTARTS} ]
}}
stopped() {{ scontrol show job "$job" | grep -q " Requeue=0"; }}  # by `driftmap stop`
if again && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] && ! stopped; then
    echo "driftmap: ended with exit code $code; requeued, to go on from the last checkpoint"
    scontrol requeue "$job"
fi
exit $code"""
