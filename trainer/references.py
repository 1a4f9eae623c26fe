"""Real pictures to compare with: which ones, what they show, and what a judge saw of them, kept in a file.

A file's name is a hash of all that decides what is in it: the data set, how many of its samples, the judge
(its weights, sizes and scales of pictures), and the autoencoder that reconstructs them. It is written whole
or not at all, and a file that is not what was written is measured again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.cache import folder_of_node
from ..data.decode import find_decoder, floats
from ..data.reader import Reader
from ..data.samples import Samples
from ..data.shards import ShardSet, write_atomically
from ..data.text import CaptionPlace
from ..models.autoencoder import decode, encode_moments
from .build import shards_of_run
from .judge import Judge, Meter, Prompts, Seen
from .log import warn
from .metrics.chosen import chosen, partners
from .metrics.frechet import Moments
from .signals import Stopped
from .unfinished import Unfinished
from .world import World


@dataclass(frozen=True)
class Dealer:
    """Gives batches of sample numbers to processes in turn: batch b to process b mod world.

    So a batch, and with it every picture, is the same on any number of processes. Raises Stopped on every
    process after a batch during which any has been asked to stop.
    """

    world: World
    batch_size: int

    def __call__(self, total: int, done: int = 0) -> Iterator[np.ndarray]:
        """Yield this process's batches of done .. total - 1; every process must take them all."""
        return (numbers for numbers, mine in self.in_step(total, done) if mine)

    def in_step(self, total: int, done: int = 0) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield as many batches on every process, and whether each is its own: the first one fills up."""
        round_size = self.batch_size * self.world.size
        for start in range(done, total, round_size):
            begin = start + self.world.rank * self.batch_size
            mine = begin < total
            begin = begin if mine else 0
            yield np.arange(begin, min(begin + self.batch_size, total)), mine
            if self.world.stopping():
                raise Stopped(min(start + round_size, total))


MADE = {"latents", "trajectories"}  # in the card of what was made from pictures, and holds none


@dataclass(frozen=True)
class Part:
    """Samples that stand for a data set of pictures, by their places 0 .. size - 1, which go round."""

    shards: ShardSet
    size: int

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number in the data set of the sample at each place."""
        return chosen(self.shards.num_samples, self.size)

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.shards, find_decoder(self.shards))

    def batch(self, places: np.ndarray) -> dict[str, Tensor]:
        """Return samples as a loader does; their `index` is their number in the data set."""
        numbers = self.numbers[places % self.size]
        return self._samples.batch(numbers, index=numbers)

    def pictures(self, places: np.ndarray) -> Tensor:
        """Return pictures (B, C, H, W) in [-1, 1]."""
        batch = self.batch(places)
        if "data" not in batch or batch["data"].dim() != 4:
            raise ValueError(f"{self.shards.folder} holds {', '.join(batch)}; expected pictures")
        return floats(batch["data"])

    @cached_property
    def shape(self) -> torch.Size:
        """The shape (C, H, W) of the first picture."""
        return self.pictures(np.zeros(1, np.int64)).shape[1:]

    def labels(self, places: np.ndarray) -> Tensor | None:
        """Return the classes (B,), nothing where there are none."""
        return self._samples.labels(self.numbers[places % self.size]).get("label")

    @cached_property
    def _captions(self) -> tuple[CaptionPlace, Reader]:
        place = CaptionPlace.of(self.shards)
        return place, Reader(self.shards, extensions={place.member})

    def captions(self, places: np.ndarray, *, shuffled: bool = False) -> list[str]:
        """Return the captions of the samples, or of others that are the same ones every time."""
        place, reader = self._captions
        places = partners(self.size)[places % self.size] if shuffled else places % self.size
        return [place.read(reader.read(number)) for number in self.numbers[places].tolist()]

    def prompts(self, places: np.ndarray, judge: Judge, device: torch.device) -> Prompts:
        """Return what a judge has to know of these samples."""
        labels = self.labels(places)
        labels = None if labels is None else labels.to(device)
        if judge.captions is None:
            return Prompts(labels)
        own, other = (self.captions(places, shuffled=shuffled) for shuffled in (False, True))
        return Prompts(labels, judge.captions.captions(own), judge.captions.captions(other))


def makers(shards: ShardSet) -> list[Path]:
    """Return the runs that made a data set from pictures: the autoencoder of latents, or a teacher."""
    if "latents" in shards.info:
        return [Path(shards.info["latents"]["autoencoder"])]
    return [Path(shards.info["trajectories"]["teacher"]["run"])]


def pictures_behind(latents: ShardSet, runs: list[Path]) -> ShardSet | None:
    """Return the pictures that latents were made of, where one of these runs was trained on them."""
    for run in runs:
        if (run / "recipe.yaml").is_file():
            pictures = shards_of_run(run)
            if pictures.fingerprint == latents.info.get("encoded_from"):
                return pictures
    return None


def reconstruct(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return pictures after the autoencoder, by their posterior means."""
    return decode(autoencoder, encode_moments(autoencoder, pictures)[0]).clamp(-1, 1)


@dataclass(frozen=True)
class References:
    """What a judge saw of real pictures, measured once."""

    judge: Judge
    dealer: Dealer
    folder: Path
    autoencoder: AutoencoderKL | None
    autoencoder_hash: str | None

    def seen(self, part: Part, *, reconstructed: bool = False) -> Seen:
        """Return what the judge saw of pictures or their reconstructions; every process must call."""
        world = self.dealer.world
        about = self.about(part, reconstructed=reconstructed)
        file = self.folder / f"{key_of(about)}.safetensors"
        found = world.first(lambda: read_seen(file, about))
        if found is None:
            unfinished = Unfinished(file, about, world)
            found = self._measure(part, self.autoencoder if reconstructed else None, unfinished)
            world.first(lambda: write_seen(file, found, about))
            unfinished.forget()
        return found

    def about(self, part: Part, *, reconstructed: bool = False) -> dict[str, Any]:
        """Return all that decides what is seen of a part."""
        autoencoder = self.autoencoder_hash if reconstructed else None
        data = {"data": part.shards.fingerprint, "num_samples": part.size}
        return data | {"label": part.shards.label, "judge": self.judge.hash, "autoencoder": autoencoder}

    def _measure(self, part: Part, autoencoder: AutoencoderKL | None, unfinished: Unfinished) -> Seen:
        meter, device = Meter(self.judge, part.size), self.dealer.world.device
        dealt = partial(self.dealer, part.size)
        for places in unfinished.resumed(dealt, take=meter.add, state=meter.state):
            pictures = part.pictures(places).to(device)
            pictures = pictures if autoencoder is None else reconstruct(autoencoder, pictures)
            meter.update(pictures, places, part.prompts(places, self.judge, device))
        return meter.seen(self.dealer.world)


def key_of(about: dict[str, Any]) -> str:
    """Return the name of what was seen."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def default_folder() -> Path:
    """Return where references are kept: beside the cache of shards (DRIFTMAP_CACHE)."""
    return folder_of_node() / "driftmap-references"


def write_seen(file: Path, seen: Seen, about: dict[str, Any]) -> None:
    """Write what was seen, with a hash of it."""
    tensors = {"mean": seen.moments.mean, "scatter": seen.moments.scatter, "points": seen.points}
    told = {"count": seen.moments.count, "answers": seen.answers, "about": about}
    told["hash"] = _content(tensors, told)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(file, save(tensors, {"seen": json.dumps(told)}))


def read_seen(file: Path, about: dict[str, Any]) -> Seen | None:
    """Read what was seen, None where it has not been measured, or is not what was written."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stream:
            told = json.loads((stream.metadata() or {})["seen"])
            tensors = {name: stream.get_tensor(name) for name in ("mean", "scatter", "points")}
        if told["about"] == about and told.pop("hash") == _content(tensors, told):
            moments = Moments(told["count"], tensors["mean"], tensors["scatter"])
            return Seen(moments, tensors["points"], told["answers"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warn(f"{file} cannot be read ({error}); its pictures are measured again")
        return None
    warn(f"{file} is not what was written there; its pictures are measured again")
    return None


def _content(tensors: dict[str, Tensor], told: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
