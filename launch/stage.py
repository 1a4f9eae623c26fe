"""A `driftmap` command as a stage of a workflow: read as the command line reads it, and what it makes.

What a command makes is whole when its proofs are there: files that are renamed into place when all else is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..data.card import CARD
from ..trainer.config import ConfigError, nearest, read_config


@dataclass(frozen=True)
class Made:
    """Where a command leaves its result, and the files that show that it is whole."""

    place: Path
    proofs: tuple[Path, ...]

    @property
    def time(self) -> float | None:
        """When the last proof was written, in seconds since the epoch; None where one is missing."""
        times = [file.stat().st_mtime for file in self.proofs if file.is_file()]
        return max(times) if len(times) == len(self.proofs) else None


def made_by(words: Sequence[str], *, place: str) -> Made:
    """Return what a command, given by its words, will make; `place` names it in messages.

    Raises ConfigError where the command line would refuse the words, or the command makes nothing.
    """
    name, settings = _read(words, place=place)
    if name not in _MADE:
        raise ConfigError(f"{place}: {name!r} makes nothing that could be a stage{nearest(name, _MADE)}")
    if name == "train" and settings["check"]:
        raise ConfigError(f"{place}: --check trains nothing; remove it")
    try:
        return _MADE[name](settings)
    except ConfigError as error:  # of the config that it trains
        raise ConfigError(f"{place}: {error}") from error


def config_of(words: Sequence[str]) -> tuple[Path, list[str]] | None:
    """Return the config and the overrides of a command that trains, None of any other."""
    name, settings = _read(words, place="")
    return (settings["config"], settings["overrides"] or []) if name == "train" else None


def _read(words: Sequence[str], *, place: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a command and its settings, defaults included."""
    from .cli import app  # which imports this file

    # Any: typer brings its own click or takes the installed one, by version.
    command: Any = typer.main.get_command(app)
    name, rest = "", list(words)
    while commands := getattr(command, "commands", None):
        word = rest.pop(0) if rest else ""
        if word not in commands:
            raise ConfigError(
                f"{place}: no such command {f'{name} {word}'.strip()!r}{nearest(word, commands)}"
            )
        command, name = commands[word], f"{name} {word}".strip()
    if "--help" in rest:
        raise ConfigError(f"{place}: --help does nothing in a stage; remove it")
    try:
        return name, command.make_context(name, rest).params
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click's exceptions, wherever they come from
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(f"{place}: {message} (see driftmap {name} --help)") from error


def _run(settings: dict[str, Any]) -> Made:
    folder = settings["out"]
    steps = read_config(settings["config"], settings["overrides"] or ()).get("training", {}).get("steps")
    number = steps if isinstance(steps, int) else 0  # the check of the recipe tells of it
    return Made(folder, (folder / "checkpoints" / f"step-{number:08d}" / "manifest.json",))


def _file(default: Callable[[dict[str, Any]], Path]) -> Callable[[dict[str, Any]], Made]:
    """Return what says that a command makes one file, --out or the default."""

    def made(settings: dict[str, Any]) -> Made:
        file = settings["out"] or default(settings)
        return Made(file, (file,))

    return made


def _of_run(name: str) -> Callable[[dict[str, Any]], Made]:
    return _file(lambda settings: settings["run"] / name)


def _shards(settings: dict[str, Any]) -> Made:
    out = settings["out"]
    folders = [out] if settings.get("held_out") is None else [out, out.with_name(f"{out.name}-held-out")]
    return Made(out, tuple(folder / CARD for folder in folders))


def _pipeline(settings: dict[str, Any]) -> Made:
    return Made(settings["out"], (settings["out"] / "model_index.json",))


def _published(settings: dict[str, Any]) -> Made:
    if settings["dry_run"]:
        raise ConfigError("--dry-run publishes nothing; remove it")
    file = settings["run"] / "published.json"
    return Made(file, (file,))


_MADE: dict[str, Callable[[dict[str, Any]], Made]] = {
    "train": _run,
    "evaluate": _of_run("evaluation.json"),
    "likelihood": _of_run("likelihood.json"),
    "invert": _of_run("inversion.json"),
    "sample": _file(lambda settings: settings["out"]),
    "ema": _file(lambda settings: settings["out"]),
    "report": _file(lambda settings: settings["runs"][0] / "report.html"),
    "export": _pipeline,
    "publish": _published,
    "trajectories": _shards,
    "shards make": _shards,
    "shards encode": _shards,
}
