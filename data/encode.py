"""Pictures to latents, once, before training.

What is stored is the distribution that the autoencoder gives, its mean and standard deviation, so that
training can draw a new latent from it each time. Keys, order and shards are those of the pictures.

A killed run goes on at the first shard that is not whole. It first wrote down what it was doing
(`encoding.json`), so that shards of two encoders are never mixed.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decode import Decoder, decode_batch, find_decoder, floats
from .members import npy_bytes
from .reader import Reader, Sample
from .shards import ShardSet, index_shards
from .writer import write_atomically, write_shard

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_COPIED = ("cls", "json")
_NOTE = "encoding.json"


def encode_shards(
    source: ShardSet,
    out: Path | str,
    *,
    encode: Encode,
    info: dict[str, Any],
    decoder: Decoder | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Encode every picture of a data set and return the data set of their latents.

    `encode` maps pictures (B, C, H, W) in [-1, 1] to mean and standard deviation, each (B, C', H', W').
    They are stored in float16. `info["encoder"]` says which encoder it is; all of `info` goes into the
    new data set's card. `progress` is called with the samples done, those of an earlier run included.

    Raises `ValueError` if `out` holds latents of another encoder or of other pictures, or if the encoder
    gives numbers that float16 cannot hold; it names the sample.
    """
    out = Path(out)
    if "encoder" not in info:
        raise ValueError(f"info has the keys {sorted(info)}; it needs 'encoder', which names the encoder")
    about = json.loads(json.dumps({"encoder": info["encoder"], "encoded_from": source.fingerprint}))
    decoder = decoder or find_decoder(source)
    if "moments.npy" in decoder.extensions:
        raise ValueError(f"{source.folder} holds latents already; expected pictures")
    _claim(out, about)
    reader = Reader(source, extensions={*decoder.extensions, *_COPIED})
    for name, start, count in zip(source.shards, source.starts, source.counts, strict=True):
        if not (out / name).exists():
            samples = (reader.read(number) for number in range(start, start + count))
            write_shard(out / name, _encoded(samples, encode, decoder, batch_size))
        if progress is not None:
            progress(start + count)
    latents = index_shards(out, info={**info, **about}, licence=source.licence, source=source.source)
    (out / _NOTE).unlink(missing_ok=True)
    return latents


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Note in the folder what is being written there, or check that it is the same as before."""
    note = out / _NOTE
    if note.is_file():
        found = json.loads(note.read_bytes())
    elif out.exists() and any(out.iterdir()):
        card = ShardSet.open(out).info
        found = {name: card.get(name) for name in about}
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(about).encode())
        return
    if found != about:
        raise ValueError(f"{out} holds latents of {found}; expected {about}. Choose another folder")


def _encoded(
    samples: Iterator[Sample], encode: Encode, decoder: Decoder, batch_size: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    while batch := list(islice(samples, batch_size)):
        with torch.inference_mode():
            mean, std = encode(floats(decode_batch(batch, decoder)["data"]))
        if not mean.shape == std.shape or mean.ndim != 4 or len(mean) != len(batch):
            raise ValueError(
                f"the encoder gave mean {tuple(mean.shape)} and std {tuple(std.shape)} "
                f"for {len(batch)} pictures; expected both (B, C, H, W)"
            )
        moments = torch.stack([mean, std], dim=1).detach().to("cpu", torch.float16).numpy()
        for sample, sample_moments in zip(batch, moments, strict=True):
            if not np.isfinite(sample_moments).all():
                raise ValueError(
                    f"{sample.name}: its latent is not finite in float16 (largest number 65504); "
                    "check the encoder and the scaling of its latents"
                )
            copied = {name: sample.members[name] for name in _COPIED if name in sample.members}
            yield sample.key, {"moments.npy": npy_bytes(sample_moments), **copied}
