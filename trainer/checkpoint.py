"""Checkpoints that are whole or not there: written aside, hashed, synced, renamed; pruned only after success.

RUN/checkpoints/step-00001234/ holds
    model.safetensors      parameters and buffers
    ema.safetensors        their fp32 mean
    optimizer.safetensors  both Adam moments and the step of every parameter, by name
    state.json             step, position in the data stream, lineage (seed, data, teacher)
    manifest.json          size and sha256 of every file above; a folder without a matching one is not a
    checkpoint
No generator states: randomness is keyed (seeds.py). Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .log import warn
from .loop import Run

FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used, told so that a person can mend it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of `model`, `ema` or `optimizer`, on the CPU."""
        return load_file(self.folder / f"{kind}.safetensors")


def save(run: Run) -> Path:
    """Write the run's checkpoint of its present step and prune old ones; return its folder."""
    return run.strategy.first(lambda: _save(run))


def _save(run: Run) -> Path:
    root = run.folder / "checkpoints"
    final = root / f"step-{run.step:08d}"
    aside = final.with_suffix(".tmp")
    for leftover in root.glob("step-????????.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    try:
        _write(run, aside)
        if final.exists():  # it is damaged, or the run would have gone on from it
            _remove(final)
        os.rename(aside, final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(folder.name for folder in folders(run.folder)) or "none"
        raise CheckpointError(
            f"cannot save {final}: {error}; checkpoints on disk stay intact ({kept}). "
            "Make room or mend the folder, then give the same command: the run goes on from the last one"
        ) from error
    for old in folders(run.folder)[: -run.recipe.training.keep]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Delete a checkpoint under another name, so that no half of it is ever taken for one."""
    removed = folder.with_suffix(".removed")
    os.rename(folder, removed)
    shutil.rmtree(removed)


def _write(run: Run, folder: Path) -> None:
    """Write all files of a checkpoint into a new folder and sync them."""
    folder.mkdir(parents=True)
    save_file(_contiguous(run.model.state_dict()), folder / "model.safetensors")
    save_file(_contiguous(run.ema.weights), folder / "ema.safetensors")
    save_file(_contiguous(_moments(run)), folder / "optimizer.safetensors")
    state = {
        "step": run.step,
        "samples": run.samples,
        "ema_updates": run.ema.num_updates,
        "lineage": run.lineage,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {file.name: _digest(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in folder.iterdir():
        # safetensors (0.8) lets nobody but the owner read; what others may read is for the umask to say.
        file.chmod((folder / "state.json").stat().st_mode)
        _sync(file)
    _sync(folder)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a run to a checkpoint; its loader has been started at the checkpoint's position already."""
    state = checkpoint.state
    for key, present in run.lineage.items():
        if state["lineage"][key] != present:
            raise CheckpointError(
                f"{checkpoint.folder} was made with {key} {state['lineage'][key]!r}, this run has "
                f"{present!r}, so it would not be the same run. Use the same one, or start a new run folder"
            )
    load_weights(run.model, checkpoint.weights("model"), source=checkpoint.folder)
    run.ema.load(checkpoint.weights("ema"), num_updates=state["ema_updates"])
    _restore_moments(run, checkpoint.weights("optimizer"))
    run.step = state["step"]


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


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if every file has its size and hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not isinstance(manifest, dict) or manifest.keys() != FILES:
            return f"{folder / 'manifest.json'}: it does not list {', '.join(sorted(FILES))}"
        for name, digest in manifest.items():
            if _digest(folder / name) != digest:
                return f"{folder / name}: the contents differ from the manifest"
    except FileNotFoundError as error:
        return f"{error.filename}: the file is missing"
    except OSError as error:
        return f"{folder}: {error}"
    except ValueError as error:  # no JSON, or no text at all
        return f"{folder / 'manifest.json'}: it is no JSON ({error})"
    return None


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
    own = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    differences = [f"missing {name}" for name in own if name not in weights and name not in buffers]
    differences += [f"unexpected {name}" for name in weights if name not in own]
    differences += [
        f"{name} is {list(weights[name].shape)}, expected {list(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{source} is a checkpoint of another model: {'; '.join(differences[:5])}{more}. "
            "Give the model section that it was trained with, or start a new run folder"
        )
    model.load_state_dict(weights, strict=False)


def _moments(run: Run) -> dict[str, Tensor]:
    """Return the optimizer's state as `moment/parameter` tensors."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return {
        f"{moment}/{names[id(parameter)]}": values[moment]
        for parameter, values in run.optimizer.state.items()
        for moment in MOMENTS
    }


def _restore_moments(run: Run, moments: dict[str, Tensor]) -> None:
    """Put `moment/parameter` tensors back; `step` stays where the optimizer keeps it."""
    state: dict[int, dict[str, Tensor]] = {}
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    ordered = [names[id(parameter)] for group in run.optimizer.param_groups for parameter in group["params"]]
    for number, name in enumerate(ordered):
        if f"step/{name}" in moments:
            state[number] = {moment: moments[f"{moment}/{name}"] for moment in MOMENTS}
    run.optimizer.load_state_dict(
        {"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]}
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
