"""Saving while training goes on: written aside, hashed, synced, renamed; pruned only after success.

Each process copies what it holds to the CPU and writes it in a thread of its own; in a later step, when all
have told that they are done, the first one writes the manifest and gives the folder its name.
"""

import json
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import CheckpointError, buffers_of, digest_of, folders, tensors_of
from .loop import Run
from .pieces import Piece, file_name, write_pieces


@dataclass
class _Part:
    """What one process adds to a checkpoint, written in a thread."""

    folder: Path
    pieces: dict[str, list[Piece]]  # by file name
    state: dict[str, Any] | None  # of the first process
    digests: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def write(self) -> None:
        """Write and sync the files; keep their digests, or what went wrong."""
        try:
            for name, pieces in self.pieces.items():
                write_pieces(self.folder / name, pieces)
            if self.state is not None:
                (self.folder / "state.json").write_text(json.dumps(self.state, indent=1))
            mode = self.folder.stat().st_mode & 0o666
            for name in [*self.pieces, *(["state.json"] if self.state is not None else [])]:
                # safetensors (0.8) lets nobody but the owner read; that is for the umask to say.
                (self.folder / name).chmod(mode)
                self.digests[name] = digest_of(self.folder / name)
                _sync(self.folder / name)
        except (OSError, SafetensorError) as error:
            self.problem = str(error)
        self.pieces.clear()


class Saver:
    """A hook that saves when a period ends, at the last step, and where a stop was asked.

    What is saved, when and where is said by `place`, `due`, `kinds`, `state` and `prune`: see posthoc.py.
    """

    place = "checkpoints"

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._part: _Part | None = None
        self._folder = Path()

    def due(self, run: Run) -> bool:
        """Return whether to save after this step."""
        return run.save_due

    def kinds(self, run: Run) -> list[str]:
        """Return the kinds of tensors to save."""
        return ["model", "optimizer", *run.ema.means]

    def state(self, run: Run) -> dict[str, Any]:
        """Return what state.json is to hold."""
        fake = run.strategy.fake_updates
        return {
            "step": run.step,
            "samples": run.samples,
            "optimizer_updates": run.strategy.num_updates,
            "ema_updates": run.ema.num_updates,
            "loss_scale": run.strategy.scale,
            "world_size": run.strategy.world.size,
            "lineage": run.lineage,
            "quarantine": run.batches.bad,
            **({} if fake is None else {"fake_updates": fake}),
        }

    def prune(self, run: Run) -> None:
        """Remove what the folder just saved makes superfluous."""
        for old in folders(run.folder)[: -run.recipe.training.keep]:
            remove(old)

    def __call__(self, run: Run, losses: dict[str, Tensor]) -> None:
        """Finish the save under way if its files are written; begin one where it is due."""
        if not run.strategy.stepped:
            return
        due = self.due(run)
        self._look(run, wait=due or run.save_due)
        if due:
            self.begin(run)
            ends = run.finished or run.stop_asked or not run.recipe.training.save_in_background
            self._look(run, wait=ends)

    def begin(self, run: Run) -> None:
        """Copy what this process holds to the CPU and let a thread write it."""
        self._folder = run.folder / self.place / f"step-{run.step:08d}"
        aside = self._folder.with_suffix(".tmp")
        run.strategy.world.first(lambda: _start(run, aside))
        state = self.state(run) if run.strategy.world.rank == 0 else None
        self._part = _Part(aside, _pieces(run, self.kinds(run)), state)
        self._thread = threading.Thread(target=self._part.write, name="checkpoint")
        self._thread.start()

    def finish(self, run: Run) -> None:
        """Wait for the save under way, if there is one; every process must call."""
        self._look(run, wait=True)

    def _look(self, run: Run, *, wait: bool) -> None:
        """Give the folder its name if every process has written its part; raise where one could not."""
        if self._thread is None or self._part is None:
            return
        if wait:
            self._thread.join()
        done = not self._thread.is_alive()
        answers = run.strategy.world.gathered(
            (done, self._part.digests, self._part.problem) if done else None
        )
        parts = [answer for answer in answers if answer is not None]
        if len(parts) == len(answers):
            self._thread.join()
            self._thread = self._part = None
            digests = {name: digest for _, part, _ in parts for name, digest in part.items()}
            problems = [problem for _, _, problem in parts if problem is not None]
            run.strategy.world.first(lambda: self._commit(run, digests, problems))

    def _commit(self, run: Run, digests: dict[str, Any], problems: list[str]) -> None:
        _commit(run, self._folder, digests, problems)
        self.prune(run)


def save(run: Run) -> Path:
    """Write the run's checkpoint of its present step and prune old ones; return its folder."""
    saver = Saver()
    saver.begin(run)
    saver.finish(run)
    return saver._folder


def _start(run: Run, aside: Path) -> None:
    """Make the folder to write into, clearing away those of processes that were killed."""
    for leftover in aside.parent.glob("step-????????.*"):
        shutil.rmtree(leftover)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise _cannot_save(run, aside, str(error)) from error


def _commit(run: Run, final: Path, digests: dict[str, Any], problems: list[str]) -> None:
    """Write the manifest, sync and rename; on any failure leave what was there."""
    aside = final.with_suffix(".tmp")
    try:
        if problems:
            raise OSError(problems[0])
        (aside / "manifest.json").write_text(json.dumps(digests, indent=1, sort_keys=True))
        _sync(aside / "manifest.json")
        _sync(aside)
        if final.exists():  # it is damaged, or the run would have gone on from it
            remove(final)
        os.rename(aside, final)
        _sync(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _cannot_save(run, final, str(error)) from error


def _cannot_save(run: Run, folder: Path, problem: str) -> CheckpointError:
    kept = ", ".join(folder.name for folder in folders(run.folder)) or "none"
    return CheckpointError(
        f"cannot save {folder}: {problem}; checkpoints on disk stay intact ({kept}). "
        "Make room or mend the folder, then give the same command: the run goes on from the last one"
    )


def remove(folder: Path) -> None:
    """Delete what was saved under another name, so that no half of it is ever taken for a whole."""
    removed = folder.with_suffix(".removed")
    os.rename(folder, removed)
    shutil.rmtree(removed)


def _pieces(run: Run, names: list[str]) -> dict[str, list[Piece]]:
    """Return copies of all that this process writes of kinds of tensors, by file name."""
    rank, size = run.strategy.world.rank, run.strategy.world.size
    kinds: dict[str, list[Piece]] = {name: [] for name in names}
    for number, fragment in enumerate(run.strategy.fragments):
        if fragment.writes:
            for kind, name, values in tensors_of(run, number, fragment):
                if kind in kinds:
                    kinds[kind].append(Piece(name, fragment.shape, fragment.start, values).copied())
    if rank == 0 and "model" in kinds:
        kinds["model"] += [Piece(name, tuple(b.shape), 0, b).copied() for name, b in buffers_of(run.model)]
    return {file_name(kind, rank, size): pieces for kind, pieces in kinds.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
