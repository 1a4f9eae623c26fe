"""Samples of a run as a grid of pictures: by class, by caption, or of what the data shows."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batch import ordered
from ..data.shards import ShardSet
from ..models.autoencoder import decode_latents
from ..models.condition import Condition, padded, take
from ..models.flow_map import FlowMap
from ..models.samplers import Sampler, sampler_of, time_grid
from ..trainer.build import load_flow_map, run_recipe, shards_of_run
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of, text_encoder_of
from ..trainer.evaluate import sample_noise
from ..trainer.guiding import guided, usual_sampler
from ..trainer.latents import condition_of
from ..trainer.seeds import Random
from .evaluation import write_grid


@dataclass(frozen=True)
class SamplingRequest:
    """What to sample: how many, in how many evaluations (4) along which times, and of what.

    `label` is a class by number or name, by default all in turn; `prompts` are captions, taken in turn, by
    default those of the first samples of the run's data. `text_encoder` is where the encoder of prompts is,
    by default where it was when the data was encoded. `grid` are all times, from 1 to 0, instead of a number
    of evaluations; `shift` moves the times of an even grid towards noise.
    """

    run: Path
    nfe: int | None = None
    count: int = 40
    label: str | None = None
    prompts: tuple[str, ...] = ()
    text_encoder: str | None = None
    guidance: float = 1.0
    seed: int = 0
    sampler: str | None = None  # None: what the run was trained for
    rescale: float = 0.0
    weak: Path | None = None  # a run that `guidance` goes away from, instead of having no condition
    grid: tuple[float, ...] = ()
    shift: float = 1.0


def sample_run(request: SamplingRequest, out: Path) -> Tensor | None:
    """Sample a run into a grid: jumps of a flow map, DDIM's steps of a denoiser, Euler's of a velocity.

    Returns the evaluations (count,) that each sample took where its sampler has chosen them.
    """
    model = load_flow_map(request.run)
    shards = shards_of_run(request.run)
    condition = _condition(request, model, shards)
    samples, evaluations = _samples(request, model, condition)
    if "latents" in shards.info:
        samples = decode_latents(autoencoder_of(shards), samples)
    write_grid(out, samples.clamp(-1, 1))
    return evaluations


def _samples(
    request: SamplingRequest, model: FlowMap, condition: Condition | None
) -> tuple[Tensor, Tensor | None]:
    """Return samples and the evaluations (count,) that each took where its sampler has chosen them."""
    noise = sample_noise(request.count, model.sample_shape, seed=request.seed)
    random = Random(request.seed, torch.arange(request.count))
    objective = run_recipe(request.run)["objective"]["name"]
    built_in = model.takes_guidance
    name = request.sampler or usual_sampler(objective, request.guidance, built_in=built_in)
    evaluations: list[Tensor] = []
    sampler = sampler_of(
        name,
        path=model.path_of_states,
        draw=lambda step: random.normal(f"sample step {step}", model.sample_shape),
        evaluated=evaluations.append,
    )
    if sampler.jumps and request.guidance != 1 and not built_in:
        raise ConfigError(
            f"--sampler {name}: a jump cannot be guided, as --guidance {request.guidance} asks for, but by a "
            "network that takes the scale as an input (model.guidance_input)"
        )
    weak = None if request.weak is None else load_flow_map(request.weak)
    velocity = guided(model, request.guidance, rescale=request.rescale, weak=weak)
    cost = sampler.evaluations * getattr(velocity, "evaluations", 1)
    grid = _grid(request, name, sampler, cost)
    samples = sampler.sample(velocity, noise, grid=grid, condition=condition)
    return samples, evaluations[0] if evaluations else None


def parse_grid(text: str) -> tuple[float, ...]:
    """Return the times of a list such as "1,0.6,0", none of an empty one."""
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        raise ConfigError(f"--grid {text}: expected times, such as 1,0.6,0") from None


def _grid(request: SamplingRequest, name: str, sampler: Sampler, cost: int) -> Tensor:
    """Return the times of the steps of a sampler, each of which takes `cost` evaluations."""
    if request.grid:
        grid = torch.tensor(request.grid, dtype=torch.float64)
        if request.nfe is not None or request.shift != 1:
            raise ConfigError("--grid has all the times; leave out --nfe and --shift")
        repeats = name.partition(":")[0] == "gamma"  # a restart
        falls = grid.diff() <= 0 if repeats else grid.diff() < 0
        if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falls.all() or grid[1] == 1:
            raise ConfigError(
                f"--grid {','.join(f'{t:g}' for t in request.grid)}: expected times that fall from 1 to 0, "
                "such as 1,0.6,0; only gamma takes a time twice"
            )
        return grid
    nfe = 4 if request.nfe is None else request.nfe
    if nfe % cost:
        raise ConfigError(
            f"--nfe {nfe}: a step of {name} takes {cost} evaluations here; give a multiple of {cost}"
        )
    if request.shift == 1:
        return sampler.grid(nfe // cost)
    if sampler.grid is not time_grid:
        raise ConfigError(f"--shift {request.shift:g}: {name} has times of its own; leave it out")
    return time_grid(nfe // cost, shift=request.shift)


def _condition(request: SamplingRequest, model: FlowMap, shards: ShardSet) -> Condition | None:
    """Return what the samples are of."""
    if model.text_width:
        if request.label is not None:
            raise ConfigError(f"--label {request.label}: {request.run} takes captions; give --prompt")
        return _captions(request, shards)
    if request.prompts:
        raise ConfigError(f"--prompt: {request.run} takes no captions; train one with model.text_width")
    num_classes = model.null_condition
    if not isinstance(num_classes, int):
        num_classes = 0
    if request.label is not None:
        return torch.full((request.count,), _number(request, num_classes, shards.label_names))
    return torch.arange(request.count) % num_classes if num_classes else None


def _number(request: SamplingRequest, num_classes: int, names: list[str]) -> int:
    """Return the number of the class that a person has named."""
    label = request.label or ""
    number = names.index(label) if label in names else int(label) if label.isdecimal() else num_classes
    if number >= num_classes:
        named = f": {', '.join(names)}" if names and num_classes else ""
        raise ConfigError(f"--label {label}: {request.run} has {num_classes} classes, counted from 0{named}")
    return number


def _captions(request: SamplingRequest, shards: ShardSet) -> Condition | None:
    """Return as many captions as there are samples."""
    if not request.prompts:
        count = min(request.count, shards.num_samples)
        found = condition_of(next(ordered(shards, count)))
        return take(found, torch.arange(request.count) % count)
    try:
        encoder = text_encoder_of(shards, request.text_encoder)
    except ValueError as error:
        raise ConfigError(
            f"--prompt needs the text encoder of {shards.folder}: {error}. Say where it is by --text-encoder"
        ) from error
    # To half precision, as the captions of the data are stored.
    encoded = padded([tokens.half().float() for tokens in encoder(request.prompts)])
    return take(encoded, torch.arange(request.count) % len(request.prompts))
