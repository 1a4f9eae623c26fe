"""Tensors of many processes as files, read back by any number of processes, cut in any other way.

A kind of tensors (model, ema, optimizer) is one safetensors file a process, KIND-00001-of-00002.safetensors.
It holds tensors by name, either whole or a run of elements [start, start + numel) in row-major order, flat,
whose start and whole shape stand in the file's metadata. Nothing is pickled.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor `name` of shape `shape`, in memory."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    def copied(self) -> "Piece":
        """Return the piece as a copy on the CPU: whole in its shape, else flat."""
        values = self.values.detach()
        whole = values.numel() == prod(self.shape)
        flat = values.contiguous().reshape(self.shape if whole else (-1,))
        copy = torch.empty(flat.shape, dtype=flat.dtype)
        return Piece(self.name, self.shape, self.start, copy.copy_(flat))


def file_name(kind: str, rank: int, num_files: int) -> str:
    """Return the name of a process's file of a kind."""
    return f"{kind}-{rank + 1:05d}-of-{num_files:05d}.safetensors"


def write_pieces(file: Path, pieces: list[Piece]) -> None:
    """Write pieces that have been `copied` into a new file."""
    partial = {
        piece.name: {"start": piece.start, "shape": piece.shape}
        for piece in pieces
        if piece.values.numel() != prod(piece.shape)
    }
    save_file({piece.name: piece.values for piece in pieces}, file, {"partial": json.dumps(partial)})


class Pieces:
    """The tensors of a kind in a folder, however many processes wrote them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[tuple[int, Any, bool]]] = defaultdict(list)
        for file in sorted(folder.glob(f"{kind}-?????-of-?????.safetensors")):
            stream = safe_open(file, "pt")
            partial = json.loads((stream.metadata() or {}).get("partial", "{}"))
            for name in stream.keys():  # noqa: SIM118 - it is no dict
                place = partial.get(name)
                self.shapes[name] = tuple(place["shape"] if place else stream.get_slice(name).get_shape())
                self._runs[name].append((place["start"] if place else 0, stream, place is None))

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Return `count` elements of a tensor from `start` on, flat; without a count all, in its shape.

        Raises KeyError where the pieces do not hold them all.
        """
        wanted = prod(self.shapes[name]) if count is None else count
        found = self._overlaps(name, start, start + wanted)
        if sum(run.numel() for run in found) != wanted:
            raise KeyError(f"{name}: the elements {start} to {start + wanted} are not all there")
        flat = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
        return flat.reshape(self.shapes[name]) if count is None else flat

    def _overlaps(self, name: str, start: int, stop: int) -> list[Tensor]:
        parts = []
        for begin, stream, whole in sorted(self._runs[name], key=lambda run: run[0]):
            length = prod(self.shapes[name]) if whole else stream.get_slice(name).get_shape()[0]
            low, high = max(start, begin) - begin, min(stop, begin + length) - begin
            if low < high:
                source = stream.get_tensor(name).reshape(-1) if whole else stream.get_slice(name)
                parts.append(source[low:high])
        return parts

    def all(self) -> dict[str, Tensor]:
        """Return all tensors by name, whole."""
        return {name: self.read(name) for name in sorted(self.shapes)}
