"""From a run to the page of app.py: the run and its teacher as pipelines in RUN/app/."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer.build import run_recipe
from ..trainer.checkpoint import newest
from ..trainer.config import ConfigError
from .export import Exported, export
from .export_pretrained import is_of_checkpoint
from .publish import nfe_of

if TYPE_CHECKING:
    from .app import Shown


def serve_model(model: str, *, host: str, port: int, revision: str) -> None:
    """Serve the page of a run, of a pipeline folder, or of a model on the Hub, until it is stopped.

    Raises ConfigError where gradio is missing, or the run cannot be exported.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("the page needs gradio: pip install 'driftmap[app]'") from error
    from .app import serve

    shown = shown_of(model, revision=revision)
    if not port:
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
    print(f"http://{host}:{port}", flush=True)
    serve(shown, host=host, port=port)


def shown_of(model: str, *, revision: str = "main") -> "Shown":
    """Return what the page shows of a run, a pipeline folder, or a model on the Hub."""
    from .app import Shown

    run = Path(model)
    if not (run / "recipe.yaml").is_file():
        if run.exists() and not (run / "model_index.json").is_file():
            raise ConfigError(
                f"{run} is no run and no pipeline; give a run, what `export` wrote, or OWNER/NAME"
            )
        return Shown(model, Path(model).name, revision)
    if is_of_checkpoint(run):
        raise ConfigError(
            f"{run} started from a checkpoint of diffusers, and the page shows networks of ours; export it, "
            "and try it in a tool of diffusers"
        )
    student = _pipeline(run, run / "app" / "model", Exported(nfe=nfe_of(run, None)))
    taught = run_recipe(run).get("teacher") or {}
    source = Path(taught["run"]) if taught.get("run") else None
    if source is None or not (source / "recipe.yaml").is_file():
        return Shown(str(student), run.name)
    try:
        teacher = _pipeline(source, run / "app" / "teacher", Exported(weights=taught["weights"]))
    except ConfigError:  # of a kind that is not exported; the student's own velocity stands in, and says so
        return Shown(str(student), run.name)
    scale = taught["guidance"] if isinstance(taught["guidance"], int | float) else 1.0
    return Shown(str(student), run.name, None, str(teacher), scale, tuple(taught["guidance_interval"]))


def _pipeline(run: Path, folder: Path, chosen: Exported) -> Path:
    """Export a run, unless the folder is newer than its newest checkpoint."""
    checkpoint = newest(run)
    index = folder / "model_index.json"
    if checkpoint is not None and index.is_file():
        if index.stat().st_mtime > (checkpoint.folder / "manifest.json").stat().st_mtime:
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    return export(run, folder, chosen)
