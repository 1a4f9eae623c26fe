"""The commands `driftmap export`, `publish` and `app`; like cli.py, without torch until they are called."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Run = Annotated[Path, typer.Argument(help="a run folder that `driftmap train` made")]
Autoencoder = Annotated[Path | None, typer.Option(help="the autoencoder's run, if it has moved")]
Shift = Annotated[float, typer.Option(min=0.01, help="of the times it samples along, as `evaluate` found")]
Weights = Annotated[str, typer.Option(help="ema, model, or a file of `driftmap ema`")]
Variant = Annotated[
    list[str] | None, typer.Option(help="fp16 or bf16: the network once more in half precision")
]
Guidance = Annotated[float, typer.Option(min=1, help="the usual scale, of a network that takes one")]


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="the pipeline folder to write")],
    autoencoder: Autoencoder = None,
    shift: Shift = 1.0,
    weights: Weights = "ema",
    variant: Variant = None,
    nfe: Annotated[int, typer.Option(min=1, help="how many evaluations a sample usually takes")] = 4,
    guidance: Guidance = 1.0,
) -> None:
    """Write a flow map as a diffusers pipeline and check its samples in a process without driftmap."""
    from .export import Exported, check_export
    from .export import export as write

    chosen = Exported(weights, tuple(variant or ()), autoencoder, shift, nfe, guidance)
    write(run, out, chosen)
    difference = check_export(out, run, chosen)
    Console().print(f"{out}: loaded without driftmap, samples differ by {difference:.1e}")


def publish(
    run: Run,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub")],
    private: Annotated[bool, typer.Option("--private", help="make it private where it is new")] = False,
    space: Annotated[bool, typer.Option("--space", help="a Space of the same name, too, to try it")] = False,
    revision: Annotated[str, typer.Option(help="the branch")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="make and check all, send nothing")] = False,
    evaluation: Annotated[Path | None, typer.Option(help="by default RUN/evaluation.json")] = None,
    licence: Annotated[
        str | None, typer.Option(help="the Hub's word for it, such as apache-2.0; else the base model's")
    ] = None,
    autoencoder: Autoencoder = None,
    shift: Shift = 1.0,
    weights: Weights = "ema",
    variant: Variant = None,
    nfe: Annotated[
        int | None, typer.Option(min=1, help="the usual evaluations; as the evaluation recommends, or 4")
    ] = None,
    guidance: Guidance = 1.0,
    text_encoder: Annotated[
        str | None, typer.Option(help="the Hub's id of the encoder of captions, for those who load it")
    ] = None,
) -> None:
    """Publish a flow map on the Hub with its card, after its samples were compared; again sends nothing."""
    from .export import Exported
    from .publish import PublishRequest, nfe_of
    from .publish import publish as send

    chosen = Exported(
        weights,
        tuple(variant or ()),
        autoencoder,
        shift,
        nfe or nfe_of(run, evaluation),
        guidance,
        text_encoder,
    )
    request = PublishRequest(
        run,
        repository,
        chosen,
        private=private,
        space=space,
        revision=revision,
        dry_run=dry_run,
        evaluation=evaluation,
        licence=licence,
    )
    send(request, Console())


def app(
    model: Annotated[str, typer.Argument(help="a run, an exported pipeline, or OWNER/NAME on the Hub")],
    port: Annotated[int, typer.Option(min=0, help="0: any that is free")] = 7860,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    revision: Annotated[str, typer.Option(help="the branch, of a model on the Hub")] = "main",
) -> None:
    """Try a model in the browser: few evaluations beside many, its path, inversion of a picture."""
    from .trying import serve_model

    serve_model(model, host=host, port=port, revision=revision)
