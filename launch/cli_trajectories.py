"""The command `driftmap trajectories`; like cli.py, without torch until it is called."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from ..trainer.progress import progress
from .cli_sample import Rescale, Weak


def trajectories(
    run: Annotated[Path, typer.Argument(help="the run whose flow is solved: a teacher")],
    out: Annotated[Path, typer.Argument(help="the folder of shards to write")],
    num: Annotated[
        int | None, typer.Option(min=1, help="how many trajectories; as many as samples of its data")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of the solver")] = 16,
    every: Annotated[int, typer.Option(min=1, help="keep the state of every such step")] = 1,
    sampler: Annotated[
        Literal["heun", "euler", "dpm_solver", "ddim"] | None,
        typer.Option(help="the solver; heun, for what predicts data or noise dpm_solver"),
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance; 1 is none")] = 1.0,
    interval: Annotated[tuple[float, float], typer.Option(help="the times of guidance")] = (0.0, 1.0),
    rescale: Rescale = 0.0,
    weak: Weak = None,
    data: Annotated[
        str | None, typer.Option(help="shards whose classes or captions to take; those of the run")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise, with a trajectory's number")] = 0,
    stored: Annotated[Literal["fp16", "fp32"], typer.Option(help="the numbers of the states")] = "fp16",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="trajectories a shard")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="trajectories that are solved at once")] = 64,
) -> None:
    """Store trajectories of a teacher from noise to data, for the objective `trajectory`.

    The same command goes on when stopped; under torchrun, every process takes its share of the shards.
    """
    teacher = {"run": run, "weak": weak, "guidance": guidance}
    teacher |= {"guidance_interval": interval, "guidance_rescale": rescale}
    settings = {"num_samples": num, "steps": steps, "every": every, "sampler": sampler, "data": data}
    settings |= {"samples_per_shard": samples_per_shard, "batch_size": batch_size}
    _store(out, {"teacher": teacher, "seed": seed, "stored": stored, **settings})


def _store(out: Path, settings: dict[str, Any]) -> None:
    """Store the trajectories that the settings ask for, and tell of it."""
    from ..trainer.config import checked
    from ..trainer.trajectories import Request, draw_of, make_trajectories

    request = checked(Request, settings, place="")
    draw = draw_of(request)
    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not first)
    try:
        with progress(out.name, draw.num_samples, unit="samples", shown=first) as update:
            made = make_trajectories(request, draw, out, progress=update)
    except KeyboardInterrupt:
        names = draw.as_set.shards
        num_whole = sum((out / name).exists() for name in names)
        console.print(
            f"stopped with {num_whole} of {len(names)} shards in {out}; the same command goes on",
            soft_wrap=True,
        )
        raise
    about = made.info["trajectories"]
    console.print(
        f"{out}: {made.num_samples} trajectories of {len(about['times'])} states, {about['sampler']} in "
        f"{about['nfe']} evaluations, in {len(made.shards)} shards",
        soft_wrap=True,
    )
