"""Checkpoints: what is in one, which one to trust, and how a run goes on from it.

RUN/checkpoints/step-00001234/ holds, of every process (see pieces.py),
    model-*.safetensors      parameters in fp32, and buffers
    ema-*.safetensors        their running means, a file more for each mean more
    optimizer-*.safetensors  both Adam moments of every parameter, by name
and once
    state.json      step, position in the data stream, counters, lineage (seed, data, teacher), bad samples
    manifest.json   size and sha256 of every file above; a folder without a matching one is not a checkpoint
No generator states: randomness is keyed (seeds.py). The files say nothing of the strategy, so any number of
processes goes on from them under any strategy. saver.py writes them.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .fragment import MOMENTS, Fragment
from .log import warn
from .loop import Run
from .pieces import Pieces, file_name
from .target import follow


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used, told so that a person can mend it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Return the whole tensors of `model`, `optimizer` or a mean (`ema`), on the CPU."""
        pieces = Pieces(self.folder, kind)
        if not pieces.shapes:
            raise CheckpointError(f"{self.folder} holds no {kind}; give one of {', '.join(self._kinds())}")
        return pieces.all()

    def _kinds(self) -> list[str]:
        return sorted({file.name.rsplit("-", 3)[0] for file in self.folder.glob("*.safetensors")})


def tensors_of(run: Run, number: int, fragment: Fragment) -> list[tuple[str, str, Tensor]]:
    """Return (kind, name, live tensor) of all that belongs to the fragment of this number."""
    own = [("model", fragment.name, fragment.value)]
    own += [("optimizer", f"{moment}/{fragment.name}", getattr(fragment, moment)) for moment in MOMENTS]
    return own + [(mean, fragment.name, tensors[number]) for mean, tensors in run.ema.means.items()]


def buffers_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what is saved with a model and not trained, by name."""
    parameters = {name for name, _ in model.named_parameters()}
    return [(name, value) for name, value in model.state_dict().items() if name not in parameters]


def buffers_in(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model that a checkpoint has."""
    saved = Pieces(checkpoint.folder, "model")
    return {name: saved.read(name) for name, _ in buffers_of(model) if name in saved.shapes}


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model that do not train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a run to a checkpoint; its loader has been started at the checkpoint's position already."""
    state = checkpoint.state
    for key, present in run.lineage.items():
        if state["lineage"][key] != present:
            raise CheckpointError(
                f"{checkpoint.folder} was made with {key} {state['lineage'][key]!r}, this run has "
                f"{present!r}, so it would not be the same run. Use the same one, or start a new run folder"
            )
    restore_weights(run, checkpoint)
    run.step = state["step"]


@torch.no_grad()
def restore_weights(run: Run, checkpoint: Checkpoint) -> None:
    """Bring weights, their means and the optimizer to a checkpoint, whatever processes wrote it.

    Raises CheckpointError, naming what does not fit, before anything is changed.
    """
    kinds = {kind: Pieces(checkpoint.folder, kind) for kind in ("model", "optimizer", *run.ema.means)}
    _check_fit(run, kinds, checkpoint.folder)
    for number, fragment in enumerate(run.strategy.fragments):
        for kind, name, live in tensors_of(run, number, fragment):
            live.copy_(kinds[kind].read(name, fragment.start, live.numel()).reshape(live.shape))
    for name, buffer in buffers_of(run.model):
        buffer.copy_(kinds["model"].read(name))
    run.ema.num_updates = checkpoint.state["ema_updates"]
    run.strategy.num_updates = checkpoint.state["optimizer_updates"]
    if run.strategy.fake_updates is not None:
        run.strategy.fake_updates = checkpoint.state["fake_updates"]
    run.strategy.scale = checkpoint.state["loss_scale"]
    run.strategy.refresh()
    follow(run)


def _check_fit(run: Run, kinds: dict[str, Pieces], folder: Path) -> None:
    """Raise CheckpointError where a checkpoint lacks or adds a tensor, or has one of another shape."""
    shapes = run.shapes
    expected = {kind: shapes for kind in run.ema.means}
    expected["model"] = shapes | {name: tuple(b.shape) for name, b in buffers_of(run.model)}
    expected["optimizer"] = {
        f"{moment}/{name}": shape for moment in MOMENTS for name, shape in shapes.items()
    }
    for kind, pieces in kinds.items():
        if not pieces.shapes:
            raise CheckpointError(
                f"{folder} holds no {kind}; give the ema section that it was trained with, "
                "or start a new run folder"
            )
        _refuse(_differences(pieces.shapes, expected[kind]), folder)


def folders(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, whole or not."""
    found = (run_folder / "checkpoints").glob("step-????????")
    return sorted(folder for folder in found if folder.is_dir())


def newest(run_folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies; None if the run has none.

    Raises CheckpointError where there are checkpoints and none is whole: beginning again silently would
    lose work.
    """
    problems: list[str] = []
    for folder in reversed(folders(run_folder)):
        problem = verify(folder)
        if problem is None:
            for text in problems:
                warn(f"skipped a damaged checkpoint: {text}; using {folder.name}")
            return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
        problems.append(problem)
    if problems:
        raise CheckpointError(
            "no checkpoint is whole:\n"
            + "\n".join(problems)
            + "\nrestore one from a copy, or start a new run folder"
        )
    return None


def verify(folder: Path, *, kinds: Collection[str] = ("model", "optimizer", "ema")) -> str | None:
    """Return what is wrong with a folder, or None if it lists these kinds and every file has its hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not isinstance(manifest, dict) or not _lists(manifest, kinds):
            return f"{folder / 'manifest.json'}: it does not list the files of a checkpoint"
        for name, digest in manifest.items():
            if digest_of(folder / name) != digest:
                return f"{folder / name}: the contents differ from the manifest"
    except FileNotFoundError as error:
        return f"{error.filename}: the file is missing"
    except OSError as error:
        return f"{folder}: {error}"
    except ValueError as error:  # no JSON, or no text at all
        return f"{folder / 'manifest.json'}: it is no JSON ({error})"
    return None


def _lists(manifest: dict[str, Any], needed: Collection[str]) -> bool:
    """Return whether the names are state.json and, of each kind of tensors, a file of every process."""
    files = [name.rsplit("-", 3) for name in manifest if name != "state.json"]
    kinds = {parts[0] for parts in files}
    num_files = {int(parts[3].split(".")[0]) for parts in files if len(parts) == 4 and parts[3][:5].isdigit()}
    if "state.json" not in manifest or len(num_files) != 1 or not kinds.issuperset(needed):
        return False
    (size,) = num_files
    expected = {file_name(kind, rank, size) for kind in kinds for rank in range(size)}
    return manifest.keys() == {"state.json"} | expected


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights: what was made with one is told from what was made with another."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: Path) -> None:
    """Load weights by name, naming every difference if they belong to another model.

    Buffers may be missing from `weights` (an EMA holds parameters only); nothing else may.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    buffers = {name for name, _ in model.named_buffers()}
    expected = {name: shape for name, shape in own.items() if name in weights or name not in buffers}
    _refuse(_differences({name: tuple(value.shape) for name, value in weights.items()}, expected), source)
    model.load_state_dict(weights, strict=False)


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Return in which names and shapes tensors differ from the expected ones."""
    differences = [f"missing {name}" for name in expected if name not in found]
    differences += [f"unexpected {name}" for name in found if name not in expected]
    return differences + [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def _refuse(differences: list[str], source: Path) -> None:
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{source} is a checkpoint of another model: {'; '.join(differences[:5])}{more}. "
            "Give the model section that it was trained with, or start a new run folder"
        )


def digest_of(file: Path) -> dict[str, Any]:
    """Return the size and the sha256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
