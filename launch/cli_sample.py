"""The commands `driftmap sample` and `driftmap invert`; like cli.py, without torch until they are called."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Rescale = Annotated[
    float, typer.Option(min=0, max=1, help="keep the spread of what is guided, by this share")
]
Weak = Annotated[Path | None, typer.Option(help="autoguidance: a worse run that guidance goes away from")]


def sample(
    run: Annotated[Path, typer.Argument(help="a run folder that `driftmap train` made")],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("samples.png"),
    nfe: Annotated[int | None, typer.Option(min=1, help="network evaluations a sample; 4")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many pictures")] = 40,
    label: Annotated[
        str | None, typer.Option(help="one class, by number or name; by default all in turn")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="a caption, can be repeated; by default those of the data")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="where the encoder of prompts is, if it has moved")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="guidance; two evaluations a step, one where the network takes it")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="sample i of a seed is always the same")] = 0,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="jump, gamma, adaptive, euler, heun, ddim, ddpm, dpm_solver or edm, with settings as in "
            "gamma:gamma=0.5, or diffusers:NAME; by default what the run was trained for"
        ),
    ] = None,
    rescale: Rescale = 0.0,
    weak: Weak = None,
    grid: Annotated[
        str | None, typer.Option(help="the times of all steps from noise to data, as 1,0.6,0, without --nfe")
    ] = None,
    shift: Annotated[
        float,
        typer.Option(min=0.01, help="move the times of an even grid towards noise, as `evaluate` found"),
    ] = 1.0,
) -> None:
    """Sample a run into a grid: jumps of a flow map, DDIM's steps of a denoiser, Euler's of a velocity."""
    from .sampling import SamplingRequest, parse_grid, sample_run

    prompts = tuple(prompt or ())
    request = SamplingRequest(run, nfe, count, label, prompts, text_encoder, guidance, seed)
    request = replace(request, sampler=sampler, rescale=rescale, weak=weak)
    evaluations = sample_run(replace(request, grid=parse_grid(grid or ""), shift=shift), out)
    Console().print(out)
    if evaluations is not None:
        few, most = evaluations.double().mean(), evaluations.max()
        Console().print(f"evaluations a sample: {few:.1f} on average, {most} at most")


def invert(
    run: Annotated[Path, typer.Argument(help="the run of a flow map or of a velocity")],
    data: Annotated[Path, typer.Option(help="held-out shards of the kind that the run was trained on")],
    nfe: Annotated[str, typer.Option(help="numbers of evaluations, of each way")] = "1,2,4,8",
    sampler: Annotated[
        str | None,
        typer.Option(help="jump, euler or heun; by default euler where no jumps were trained, else jump"),
    ] = None,
    start: Annotated[
        float,
        typer.Option(
            min=0, max=0.5, help="the first time: at 0 data have no noise and a velocity may be infinite"
        ),
    ] = 0.01,
    num_samples: Annotated[int, typer.Option(min=2, help="how many of the data")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="samples at once")] = 64,
    seed: Annotated[int, typer.Option(help="of the noise of the first time")] = 0,
    out: Annotated[Path | None, typer.Option(help="by default RUN/inversion.json")] = None,
) -> None:
    """Carry data to noise and back by the same network, and measure what is lost on the way."""
    from .evaluation import parse_nfe
    from .inversion import InversionRequest, invert_run, print_inversion

    request = InversionRequest(
        run=run,
        data=data,
        nfe=parse_nfe(nfe),
        sampler=sampler,
        start=start,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
    )
    print_inversion(invert_run(request, out or run / "inversion.json"), Console())
