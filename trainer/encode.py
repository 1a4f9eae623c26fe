"""Latents by a run's autoencoder, embeddings by a text encoder, and the way back to what made them.

A set of either says in its card which weights made it, and nothing is done with it by other ones.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.decode import Decoder, Pixels, decode_batch, find_decoder, floats
from ..data.encode import encode_shards
from ..data.encoders import CaptionEncoder, Encoding, PictureEncoder, SizedCaptionEncoder
from ..data.reader import Reader
from ..data.shards import ShardSet
from ..data.text import CaptionPlace
from ..models.autoencoder import encode_moments, scale_and_shift
from ..models.prompt_encoder import PromptEncoder
from ..models.stock_autoencoder import is_stock_autoencoder, load_stock_autoencoder
from ..models.text_encoder import TextEncoder, load_text_encoder
from .build import load_model
from .checkpoint import fingerprint
from .config import ConfigError
from .signals import asked_to_stop
from .strategy import process_group
from .world import World

STATISTICS_SAMPLES = 2048
STATISTICS_SHARDS = 8  # spread over the set, as each may hold pictures of another kind or size
# Processes whose share is done wait for the others; one that has died is noticed at once all the same.
_LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Captions:
    """Captions to encode: by which encoder, where they stand (`CaptionPlace`), the most tokens of one."""

    encoder: str
    place: str | None = None
    max_tokens: int | None = None
    optional: bool = False


def encode(
    source: ShardSet,
    out: Path,
    *,
    autoencoder: Path | None = None,
    captions: Captions | None = None,
    batch_size: int = 64,
    max_bad_fraction: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Encode pictures by the autoencoder of a run, captions by a text encoder, or both, on all processes.

    A complete set of the same samples and encoders is left alone. The set's card says which encoders made it
    and how latents get zero mean and unit variance, (z - shift_factor) * scaling_factor, measured on
    some of the pictures.
    """
    if autoencoder is None and captions is None:
        raise ConfigError("nothing encodes; give the run of an autoencoder, a text encoder, or both")
    with sharing_work() as world:
        encodings = []
        if autoencoder is not None:
            encodings.append(_of_pictures(source, autoencoder, world.device))
        if captions is not None:
            encodings.append(_of_captions(source, captions, world.device))
        agree(world, encodings)
        return encode_shards(
            source,
            out,
            encodings,
            batch_size=batch_size,
            max_bad_fraction=max_bad_fraction,
            processes=world,
            progress=progress,
        )


def _of_pictures(source: ShardSet, run: Path, device: torch.device) -> Encoding:
    """Return the encoding of pictures by the autoencoder of a run."""
    decoder = find_decoder(source)
    if not isinstance(decoder, Pixels):
        raise ConfigError(f"{source.folder} holds no pictures but {', '.join(source.extensions)}")
    model = load_autoencoder(run)
    weights = fingerprint(model)
    nn.Module.to(model, device)  # diffusers' own is not typed

    def moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
        return encode_moments(model, pictures.to(device))

    def describe() -> dict[str, Any]:
        latents = latent_statistics(moments, source, decoder) | {"autoencoder": str(run)}
        if is_stock_autoencoder(run):  # networks that go with it know its own scale
            scale, shift = scale_and_shift(model)
            latents |= {"scaling_factor": scale, "shift_factor": shift}
        return {"latents": latents}

    return Encoding(PictureEncoder(moments, decoder), {"encoder": weights}, describe)


def _of_captions(source: ShardSet, captions: Captions, device: torch.device) -> Encoding:
    """Return the encoding of captions by a text encoder."""
    place = CaptionPlace.of(source, captions.place, optional=captions.optional)
    encoder = load_text_encoder(captions.encoder, max_tokens=captions.max_tokens)
    text = {"encoder": text_fingerprint(encoder), "max_tokens": encoder.max_tokens, "caption": str(place)}
    encoder.model.to(device)

    def describe() -> dict[str, Any]:
        return {"text": {**text, "name": encoder.name, "width": encoder.width}}

    if isinstance(encoder, PromptEncoder) and encoder.added:
        return Encoding(SizedCaptionEncoder(encoder, place, encoder.size), {"text": text}, describe)
    return Encoding(CaptionEncoder(encoder, place), {"text": text}, describe)


@contextmanager
def sharing_work() -> Iterator[World]:
    """Yield the processes that share a long work, which end it together where one is asked to stop."""
    with asked_to_stop() as stop:
        world = World(process_group(timeout=_LONGEST_WAIT))
        world.stop = stop
        yield world


def agree(world: World, encodings: list[Encoding]) -> None:
    """Raise ConfigError where processes have loaded different encoders, as from caches of several nodes."""
    about = [encoding.about for encoding in encodings]
    for rank, other in enumerate(world.gathered(about)):
        if other != about:
            raise ConfigError(
                f"process {world.rank} encodes by {about}, but process {rank} by {other}; "
                "give a folder that all nodes see"
            )


def latent_statistics(
    moments: Callable[[Tensor], tuple[Tensor, Tensor]], source: ShardSet, decoder: Decoder
) -> dict[str, Any]:
    """Return scale and shift of the latents of some shards' first pictures, and mean and std by channel."""
    parts: list[tuple[Tensor, Tensor]] = []
    reader = Reader(source)
    shards = np.unique(np.linspace(0, len(source.shards) - 1, STATISTICS_SHARDS).round().astype(int))
    for shard in shards.tolist():
        start = source.starts[shard]
        end = start + min(source.counts[shard], STATISTICS_SAMPLES // len(shards))
        for first in range(start, end, 64):
            samples = [reader.read(number) for number in range(first, min(end, first + 64))]
            mean, std = moments(floats(decode_batch(samples, decoder)["data"]))
            parts.append((_by_channel(mean), _by_channel(std.square())))
    mean, variance = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return {
        "scaling_factor": 1 / math.sqrt((mean.var() + variance.mean()).item()),
        "shift_factor": mean.mean().item(),
        "channel_mean": mean.mean(1).tolist(),
        "channel_std": (mean.var(1) + variance.mean(1)).sqrt().tolist(),
    }


def _by_channel(values: Tensor) -> Tensor:
    """Return (B, c, h, w) as (c, B h w), in double precision, on the CPU."""
    return values.transpose(0, 1).flatten(1).cpu().double()


def load_autoencoder(run: Path) -> AutoencoderKL:
    """Return the autoencoder of a run, or of a diffusers folder or id, ready for evaluation."""
    if is_stock_autoencoder(run):
        return load_stock_autoencoder(run)
    model = load_model(run)
    if not isinstance(model, AutoencoderKL):
        raise ConfigError(f"{run} is no run of an autoencoder; give the folder of one")
    return model


def autoencoder_of(latents: ShardSet, run: Path | None = None) -> AutoencoderKL:
    """Return the autoencoder that made a latent shard set, with the set's scale and shift in its config.

    Raises ConfigError if the run's weights are not the ones that encoded the set.
    """
    if "latents" not in latents.info:
        raise ConfigError(
            f"{latents.folder} holds no latents of an autoencoder; it was not made by shards encode"
        )
    statistics = latents.info["latents"]
    run = run or Path(statistics["autoencoder"])
    model = load_autoencoder(run)
    if fingerprint(model) != latents.info["encoder"]:
        raise ConfigError(
            f"{latents.folder} was encoded by the autoencoder {latents.info['encoder']}, but {run} holds "
            f"{fingerprint(model)}; give the right run, or encode the pictures again"
        )
    model.register_to_config(
        scaling_factor=statistics["scaling_factor"], shift_factor=statistics["shift_factor"]
    )
    return model


def text_fingerprint(encoder: TextEncoder | PromptEncoder) -> str:
    """Return a hash of a text encoder's weights and vocabulary."""
    vocabulary = json.dumps(encoder.vocabulary, sort_keys=True)
    return hashlib.sha256(f"{fingerprint(encoder.model)} {vocabulary}".encode()).hexdigest()[:16]


def text_encoder_of(shards: ShardSet, place: str | None = None) -> TextEncoder | PromptEncoder:
    """Return the text encoder that made the embeddings of a shard set, from where it was or from `place`.

    Raises ConfigError if its weights or its vocabulary are not the ones that encoded the set.
    """
    text = shards.info.get("text")
    if text is None:
        raise ConfigError(
            f"{shards.folder} holds no embeddings of captions; make them with shards encode --text-encoder"
        )
    encoder = load_text_encoder(place or text["name"], max_tokens=text["max_tokens"])
    if (found := text_fingerprint(encoder)) != text["encoder"]:
        raise ConfigError(
            f"{shards.folder} was encoded by the text encoder {text['encoder']}, but {encoder.name} is "
            f"{found}; give the right one, or encode the captions again"
        )
    return encoder
