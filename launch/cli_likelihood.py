"""The command `driftmap likelihood`; like cli.py, without torch until it is called."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def likelihood(
    run: Annotated[Path, typer.Argument(help="the run of a diffusion or flow model")],
    data: Annotated[Path, typer.Option(help="shards to measure, every sample once")],
    measures: Annotated[
        str | None,
        typer.Option(
            help="some of bound (the chain's variational bound), iw (importance-weighted bound), "
            "ode (the density of the probability flow), or exact (that of a discrete flow); bound,ode if it "
            "has them"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="steps of the chain; those of the path, else 1000")
    ] = None,
    drawn_steps: Annotated[
        int | None, typer.Option(min=1, help="terms of the bound drawn a sample; by default all are computed")
    ] = None,
    variance: Annotated[
        Literal["fixed_small", "fixed_large"] | None,
        typer.Option(help="of the chain's steps back; fixed_small for pixels, else fixed_large"),
    ] = None,
    paths: Annotated[int | None, typer.Option(min=1, help="paths a sample of iw; 64")] = None,
    solver: Annotated[
        str | None, typer.Option(help="of ode: heun:STEPS, rk4:STEPS or dopri5:TOLERANCE; dopri5:1e-5")
    ] = None,
    probe: Annotated[
        Literal["exact", "rademacher", "gaussian"] | None,
        typer.Option(help="of ode's divergence; exact up to 16 dimensions, else rademacher"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="samples at once, whole on one process")] = 128,
    seed: Annotated[int, typer.Option(help="of noise, steps and probes, with a sample's number")] = 0,
    out: Annotated[Path | None, typer.Option(help="by default RUN/likelihood.json")] = None,
) -> None:
    """Measure how likely a model finds data, in bits a dimension: bounds, density, rate-distortion curve.

    Under torchrun the processes share the samples; the numbers stay the same.
    """
    from .likelihood import LikelihoodRequest, likelihood_of_run, print_likelihood

    request = LikelihoodRequest(
        run=run,
        data=data,
        measures=() if measures is None else tuple(measures.split(",")),
        steps=steps,
        drawn_steps=drawn_steps,
        variance=variance,
        paths=paths,
        solver=solver,
        probe=probe,
        batch_size=batch_size,
        seed=seed,
    )
    result = likelihood_of_run(request, out or run / "likelihood.json")
    print_likelihood(result, Console(quiet=os.environ.get("RANK", "0") != "0"))
