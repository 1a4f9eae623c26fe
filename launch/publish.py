"""Publish a run: a pipeline on the Hub with its card, and a Space to try it.

RUN/publish/model/ is what the repository gets, RUN/publish/space/ the Space; both are made anew each time
from the same run and so have the same bytes: a second time nothing is sent. Before anything is sent a fresh
process without driftmap loads the folder and its samples are compared with the trainer's; the Hub's own call
validates the card.
"""

import json
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError
from rich.console import Console

from ..data.shards import write_atomically
from ..models.flow_map import FlowMap
from ..trainer.build import load_model
from ..trainer.config import ConfigError
from ..trainer.report import read_evaluation, read_json
from .card import card_of
from .card_data import HUB_ID, PUBLISHED, base_models, recommended
from .export import Exported, check_export, export
from .export_pretrained import is_of_checkpoint
from .hub import Changes, Repository, files_of, identify, telling

OWNED = ("transformer", "unet", "vae", "scheduler", "images", "lora")  # replaced as a whole
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class PublishRequest:
    """What to publish where: a run, as it is exported, as the repository OWNER/NAME.

    `evaluation` is by default RUN/evaluation.json; `licence` is by default that of the base model.
    """

    run: Path
    repository: str
    exported: Exported
    private: bool = False
    space: bool = False
    revision: str = "main"
    dry_run: bool = False
    evaluation: Path | None = None
    licence: str | None = None


def publish(request: PublishRequest, console: Console) -> bool:
    """Publish a run; return whether anything was sent.

    Raises ConfigError or OSError with what to do where the Hub refuses, and ValueError where the published
    samples would be others than the trainer's; the repository is as it was then.
    """
    if not HUB_ID.fullmatch(request.repository):
        raise ConfigError(f"{request.repository!r} is no name on the Hub; give OWNER/NAME")
    if request.space and is_of_checkpoint(request.run):
        raise ConfigError(
            "--space: the page shows networks of ours, not checkpoints of diffusers; leave it out"
        )
    console.print(f"publishing as {identify()}")
    folder = made(request)
    _validate(folder, "model", request.repository)
    repository = Repository(request.repository, branch=request.revision)
    if repository.changes(folder, owned=OWNED):
        difference = check_export(folder, request.run, request.exported)
        console.print(f"{folder}: loaded without driftmap, samples differ by {difference:.1e}")
    sent = _bring(repository, folder, request, console, owned=OWNED)
    told: dict[str, Any] = {"repository": request.repository, "address": repository.address}
    if request.space:
        space = Repository(request.repository, "space")
        place = _space(request)
        _validate(place, "space", request.repository)
        sent |= _bring(space, place, request, console)
        told["space"] = space.address
    if not request.dry_run:
        told |= {"branch": request.revision, "commit": repository.head()}
        file = request.run / PUBLISHED
        before = read_json(file) if file.is_file() else {}
        write_atomically(file, json.dumps({**before, **told}, indent=1).encode())
    return sent


def made(request: PublishRequest) -> Path:
    """Make what the repository gets, and return the folder."""
    folder = request.run / "publish" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(request.run, folder, request.exported)
    card = card_of(
        request.run,
        _model_of(request),
        request.exported,
        folder,
        repository=request.repository,
        evaluation=request.evaluation,
        licence=request.licence,
        base_licence=_inherited(request.run),
    )
    (folder / "README.md").write_text(card.text, encoding="utf-8")
    (folder / ".gitattributes").write_text(ATTRIBUTES)
    for name, data in card.pictures.items():
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(data)
    return folder


def _model_of(request: PublishRequest) -> FlowMap:
    """Return the model of a run, with the weights that are published."""
    if not is_of_checkpoint(request.run):
        return request.exported.model_of(request.run)
    model = load_model(request.run, weights=request.exported.weights)
    assert isinstance(model, FlowMap)
    return model


def nfe_of(run: Path, evaluation: Path | None) -> int:
    """Return how many evaluations the evaluation of a run recommends, 4 without one."""
    file = evaluation or run / "evaluation.json"
    return (recommended(read_evaluation(file)) if file.is_file() else None) or 4


def _bring(
    repository: Repository,
    folder: Path,
    request: PublishRequest,
    console: Console,
    owned: tuple[str, ...] = (),
) -> bool:
    """Make a repository like a folder; return whether there was anything to do."""
    changes = repository.changes(folder, owned=owned)
    console.print(_summary(repository, folder, changes), soft_wrap=True)
    if not changes or request.dry_run:
        return False
    repository.make(private=request.private)
    changes = repository.changes(folder, owned=owned)  # a new repository has a first commit of its own
    commit = repository.send(folder, changes, message=f"{len(changes.sent)} files by driftmap publish")
    console.print(f"{repository.address}: commit {commit[:12]}", soft_wrap=True)
    return True


def _summary(repository: Repository, folder: Path, changes: Changes) -> str:
    here = files_of(folder)
    if not changes:
        return f"{repository.address} has all {len(here)} files already; nothing to send"
    size = sum(here[name].stat().st_size for name in changes.sent)
    lines = [f"{repository.address}: {len(changes.sent)} of {len(here)} files to send, {size:,} bytes"]
    lines += [f"  send    {here[name].stat().st_size:>13,}  {name}" for name in changes.sent]
    lines += [f"  delete  {'':13}  {name}" for name in changes.deleted]
    return "\n".join(lines)


def _validate(folder: Path, kind: str, name: str) -> None:
    """Ask the Hub whether the metadata of a card is right; raises ConfigError with what it says."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text) if kind == "model" else RepoCard(text)
    with telling(name):
        try:
            card.validate(repo_type=kind)
        except ValueError as error:
            raise ConfigError(f"the Hub refuses the metadata of {folder / 'README.md'}: {error}") from error


def _inherited(run: Path) -> str | None:
    """Return the licence of the base model, as its card on the Hub says."""
    for name in base_models(run):
        with telling(name):
            try:
                card = HfApi().model_info(name).card_data
            except RepositoryNotFoundError:
                continue
        if card is not None and card.get("license"):
            return str(card.get("license"))
    return None


def _space(request: PublishRequest) -> Path:
    """Make what the Space gets: the app, which model it shows, what it needs."""
    folder = request.run / "publish" / "space"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    app = resources.files("driftmap.launch") / "app.py"
    (folder / "app.py").write_text(app.read_text(encoding="utf-8"), encoding="utf-8")
    name = request.repository.rpartition("/")[2]
    shown = {"model": request.repository, "name": name, "revision": request.revision}
    (folder / "app.json").write_text(json.dumps(shown, indent=1) + "\n")
    (folder / "requirements.txt").write_text(
        "accelerate\ndiffusers>=0.42,<1\nsafetensors\ntorch\ntransformers\n"
    )
    about = {"title": name, "sdk": "gradio", "app_file": "app.py"}
    about |= {"pinned": False, "models": [request.repository]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items())
    text = f"---\n{lines}\n---\n\nPictures of {request.repository} in 1 to 8 evaluations.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / ".gitattributes").write_text(ATTRIBUTES)
    return folder
