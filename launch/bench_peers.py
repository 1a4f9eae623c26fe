"""Readers of the same samples, ours and other people's: writing their formats, opening them at a position.

Each is opened as an endless iterator of batches that begins at a sample of the first epoch. webdataset has no
position, so going on somewhere means reading up to there.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.batch import Batches, Stream
from ..data.decode import BatchDecoder, RowDecoder, find_decoder
from ..data.members import npy_bytes, read_label, read_npy, read_pixels
from ..data.shards import ShardSet, ShardWriter, index_shards

SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Setting:
    """One kind of samples and how they are asked for."""

    name: str
    member: str
    num_samples: int
    batch_size: int
    num_batches: int  # of a round


LATENTS = Setting("latents", "moments.npy", num_samples=20_000, batch_size=256, num_batches=40)
JPEG = Setting("jpeg", "jpg", num_samples=2_000, batch_size=64, num_batches=16)


def missing(package: str) -> str:
    """Tell why a package cannot be imported; an empty string if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001 - packages that do not fit each other raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def write(setting: Setting, folder: Path, package: str) -> None:
    """Write the samples in the format of a package; all formats after the tars are made from the tars."""
    if package == "tars":
        with ShardWriter(folder / "tars", samples_per_shard=setting.num_samples // 8) as writer:
            for number in range(setting.num_samples):
                label = str(number % 1000).encode()
                writer.write(f"{number:06d}", {setting.member: _made(setting, number), "cls": label})
        index_shards(folder / "tars")
    elif package == "streaming":
        kinds = {"label": "int", "value": "bytes"}
        if setting is LATENTS:
            kinds["value"] = "ndarray:float16:2,4,32,32"
        with importlib.import_module(package).MDSWriter(out=str(folder / package), columns=kinds) as writer:
            for sample in _values(setting, folder):
                writer.write(sample)
    else:
        cache = importlib.import_module("litdata.streaming").Cache(str(folder / package), chunk_bytes="64MB")
        for number, sample in enumerate(_values(setting, folder)):
            cache[number] = sample
        cache.done()
        cache.merge()


def _made(setting: Setting, number: int) -> bytes:
    """Return a latent's moments, or a picture of smooth fields with some grain, of some 20 kB as a JPEG."""
    generator = np.random.default_rng(number)
    if setting is LATENTS:
        moments = generator.standard_normal((2, 4, 32, 32)).astype(np.float16)
        return npy_bytes(np.stack([moments[0], 0.1 + abs(moments[1])]))
    field = np.zeros((256, 256, 3))
    for side in (4, 16, 64):
        coarse = generator.standard_normal((side, side, 3)).astype(np.float32)
        layers = [Image.fromarray(coarse[..., channel]).resize((256, 256)) for channel in range(3)]
        field += np.stack([np.asarray(layer) for layer in layers], axis=-1) * 100 / side**0.5
    field += 3 * generator.standard_normal(field.shape)
    buffer = BytesIO()
    Image.fromarray((128 + field).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _values(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    for sample in _raw(folder, shuffled=False):
        value = sample[setting.member]
        yield {
            "value": read_npy(value) if setting is LATENTS else value,
            "label": read_label(sample["cls"]),
        }


def _raw(folder: Path, *, shuffled: bool) -> Any:
    webdataset = importlib.import_module("webdataset")
    urls = [str(tar) for tar in sorted((folder / "tars").glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffled else False)
    return samples.shuffle(SHUFFLE_BUFFER) if shuffled else samples


def _ours(setting: Setting, folder: Path, start: int) -> Iterator[Any]:
    stream = Stream(batch_size=setting.batch_size, seed=0)
    with Batches(ShardSet.open(folder / "tars"), stream, start=start) as batches:
        yield from batches


def _webdataset_same(setting: Setting, folder: Path, start: int) -> Iterator[Any]:
    decoder = find_decoder(ShardSet.open(folder / "tars"))
    assert isinstance(decoder, RowDecoder | BatchDecoder)
    epochs = _raw(folder, shuffled=True)
    samples = islice(chain.from_iterable(epochs for _ in count()), start, None)
    while True:
        batch = list(islice(samples, setting.batch_size))
        members = [one[setting.member] for one in batch]
        if isinstance(decoder, RowDecoder):
            decoded = decoder.of_rows(
                np.frombuffer(bytearray().join(members), np.uint8).reshape(len(members), -1)
            )
        else:
            decoded = decoder.stack(members, len(members))
        assert decoded is not None
        yield decoded | {"label": torch.tensor([read_label(one["cls"]) for one in batch])}


def _webdataset_default(setting: Setting, folder: Path, start: int) -> Iterator[Any]:
    webdataset = importlib.import_module("webdataset")
    decoded = _raw(folder, shuffled=True).decode("torchrgb").to_tuple(setting.member, "cls")
    batches = webdataset.WebLoader(decoded.batched(setting.batch_size), batch_size=None, num_workers=0)
    yield from islice(chain.from_iterable(batches for _ in count()), start // setting.batch_size, None)


def _streaming(setting: Setting, folder: Path, start: int) -> Iterator[Any]:
    package = importlib.import_module("streaming")
    local = str(folder / "streaming")
    samples = package.StreamingDataset(local=local, shuffle=True, batch_size=setting.batch_size)
    batches = _loader(package, samples, setting)
    if start:
        batches.load_state_dict(samples.state_dict(start, True) | {"epoch": 0})
    yield from chain.from_iterable(batches for _ in count())


def _litdata(setting: Setting, folder: Path, start: int) -> Iterator[Any]:
    package = importlib.import_module("litdata")
    samples = package.StreamingDataset(str(folder / "litdata"), shuffle=True)
    batches = _loader(package, samples, setting)
    if start:
        state = samples.state_dict(start, 0, setting.batch_size)
        batches.load_state_dict(batches.state_dict() | {"num_samples_yielded": start, "dataset": state})
    yield from chain.from_iterable(batches for _ in count())


def _loader(package: ModuleType, samples: Any, setting: Setting) -> Any:
    collate = torch.utils.data.default_collate if setting is LATENTS else _decode_jpeg
    return package.StreamingDataLoader(
        samples, batch_size=setting.batch_size, drop_last=True, collate_fn=collate
    )


def _decode_jpeg(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.stack([read_pixels(one["value"], 3) for one in samples])
    return torch.from_numpy(pixels), torch.tensor([int(one["label"]) for one in samples])


Opener = Callable[[Setting, Path, int], Iterator[Any]]
# By the name of a row: the package it needs, and how it is opened.
READERS: dict[str, tuple[str, Opener]] = {
    "ours": ("torch", _ours),
    "webdataset same decode": ("webdataset", _webdataset_same),
    "webdataset default": ("webdataset", _webdataset_default),
    "streaming": ("streaming", _streaming),
    "litdata": ("litdata", _litdata),
}
