"""Quality against number of network evaluations, held to the floor that the autoencoder and the sample set.

A table says what its features are, how many pictures it compares and what it can see at all:
    self             held-out pictures against as many of the training split: what chance alone gives
    reconstruction   held-out pictures against their reconstructions: what the autoencoder alone loses
A metric that does not tell the teacher's single step from its many steps is blind, and is said to be.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from scipy import linalg
from torch import Tensor

from ..data.batch import ordered
from ..data.shards import ShardSet
from ..models.autoencoder import decode, decode_latents, encode_moments
from ..models.backbones.convnet import ConvNet
from ..models.flow_map import FlowMap, Velocity
from ..models.sampler import euler, heun, jump, time_grid
from .checkpoint import fingerprint
from .seeds import Random

Sampler = Callable[[Tensor, Tensor], Tensor]  # (noise, labels) -> latents


@dataclass(frozen=True)
class Row:
    """The quality of one model at one number of evaluations; a ratio is to the teacher's many-step value."""

    model: str
    sampler: str
    nfe: int
    frechet: float
    ratio: float
    frechet_to_reconstructions: float
    kernel: float
    endpoint_error: float
    class_accuracy: float
    seconds_per_sample: float


@dataclass(frozen=True)
class Judge:
    """What pictures are compared by: a classifier's features, real pictures, and an autoencoder."""

    autoencoder: AutoencoderKL
    probe: ConvNet
    held_out: Tensor  # pictures (N, C, H, W) in [-1, 1]
    labels: Tensor  # (N,)
    training: Tensor  # as many pictures of the training split
    features_name: str

    @torch.no_grad()
    def features(self, pictures: Tensor) -> np.ndarray:
        """Return features (N, F) in float64."""
        return torch.cat([self.probe.features(part) for part in pictures.split(256)]).double().cpu().numpy()

    @torch.no_grad()
    def accuracy(self, pictures: Tensor) -> float:
        """Return the share of pictures that the probe gives their label."""
        scores = torch.cat([self.probe(part) for part in pictures.split(256)])
        return (scores.argmax(1) == self.labels).float().mean().item()

    def reconstructions(self) -> Tensor:
        """Return the held-out pictures after the autoencoder, by their posterior means."""
        parts = [encode_moments(self.autoencoder, part)[0] for part in self.held_out.split(256)]
        return torch.cat([decode(self.autoencoder, part) for part in parts]).clamp(-1, 1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features (N, F).

    Source: Dowson and Landau, 1982, eq. 4; for pictures: Heusel et al., 2017, eq. 6.
    """
    mean_gap = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(one)
    cross = linalg.eigvalsh(np.real(root @ two @ root)).clip(0)
    return float(mean_gap @ mean_gap + np.trace(one) + np.trace(two) - 2 * np.sqrt(cross).sum())


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, section 4.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def samplers(
    teacher: Velocity, student: FlowMap, nfe: list[int], many: int
) -> Iterator[tuple[str, str, int, Sampler]]:
    """Yield (model, sampler, nfe, function) of every row: the teacher at `many` first, then each nfe of both.

    A guided teacher costs two evaluations a velocity; a row whose nfe it cannot meet exactly is left out.
    """
    cost = getattr(teacher, "evaluations", 1)
    fine = time_grid(many // (2 * cost))
    yield "teacher", "heun", many, lambda noise, labels: heun(teacher, noise, grid=fine, condition=labels)
    for count in nfe:
        if count % cost == 0:
            coarse = time_grid(count // cost)
            yield "teacher", "euler", count, _bound(euler, teacher, coarse)
    for count in nfe:
        yield "student", "jump", count, _bound(jump, student, time_grid(count))


def _bound(sampler: Callable[..., Tensor], model: Any, grid: Tensor) -> Sampler:
    return lambda noise, labels: sampler(model, noise, grid=grid, condition=labels)


def evaluate(
    judge: Judge, teacher: Velocity, student: FlowMap, *, noise: Tensor, nfe: list[int], many: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the evaluation as JSON-ready values, and the pictures of every row by `model-nfe-..` names.

    `noise` (N, c, h, w) starts every sampler; N is the number of held-out pictures, whose labels are used.
    """
    real, reconstructed = judge.features(judge.held_out), judge.features(judge.reconstructions())
    floor = {
        "self": frechet_distance(real, judge.features(judge.training)),
        "reconstruction": frechet_distance(real, reconstructed),
    }
    rows: list[Row] = []
    pictures: dict[str, Tensor] = {}
    end_points = best = None
    for model, sampler, count, sample in samplers(teacher, student, nfe, many):
        began = time.perf_counter()
        latents = torch.cat(
            [sample(*parts) for parts in zip(noise.split(250), judge.labels.split(250), strict=True)]
        )
        seconds = (time.perf_counter() - began) / len(noise)
        decoded = decode_latents(judge.autoencoder, latents)
        features = judge.features(decoded)
        distance = frechet_distance(features, real)
        if end_points is None:
            end_points, best = latents, distance
        assert best is not None
        rows.append(
            Row(
                model=model,
                sampler=sampler,
                nfe=count,
                frechet=distance,
                ratio=distance / best,
                frechet_to_reconstructions=frechet_distance(features, reconstructed),
                kernel=kernel_distance(features, real),
                endpoint_error=(latents - end_points).square().mean().sqrt().item(),
                class_accuracy=judge.accuracy(decoded),
                seconds_per_sample=seconds,
            )
        )
        pictures[f"{model}-nfe-{count:03d}"] = decoded
    return _summary(judge, rows, floor, many), pictures


def _summary(judge: Judge, rows: list[Row], floor: dict[str, float], many: int) -> dict[str, Any]:
    single = next(row for row in rows if row.model == "teacher" and row.nfe < many)
    return {
        "features": judge.features_name,
        "num_samples": len(judge.held_out),
        "many_nfe": many,
        "floor": floor,
        "sees": single.ratio >= 2,
        "autoencoder": fingerprint(judge.autoencoder),
        "rows": [asdict(row) for row in rows],
    }


def pictures_of(shards: ShardSet, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` pictures of a data set and their labels."""
    batches = []
    for batch in ordered(shards, 256):
        batches.append(batch)
        if sum(len(each["index"]) for each in batches) >= count:
            break
    data = torch.cat([batch["data"] for batch in batches])[:count]
    return data, torch.cat([batch["label"] for batch in batches])[:count]


def sample_noise(count: int, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Return the noise (count, *shape) of samples 0 .. count - 1, whatever process draws them."""
    return Random(seed, torch.arange(count)).normal("sample", shape)
