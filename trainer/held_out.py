"""What a run is evaluated on while it trains: held-out samples, and what its own samples are compared by.

Everything is checked here, with the dotted place of what is wrong, before a step is made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..data.labels import CAPTION, CLASS
from ..data.shards import ShardSet
from ..data.stream import ShardStream
from ..models.flow_map import FlowMap
from .build import run_recipe
from .checkpoint import fingerprint
from .config import ConfigError
from .encode import autoencoder_of
from .features import classifier_of, features_named
from .fit import check_data, check_trajectories
from .guiding import guided
from .judge import Judge
from .recipe import EvaluationSection, Recipe, objective_name
from .references import MADE, Dealer, Part, References, default_folder, makers, pictures_behind


@dataclass(frozen=True)
class Gallery:
    """What samples are compared by, and with: held-out pictures, and training ones if they are at hand."""

    judge: Judge
    asked: Part  # of whose classes samples are to be
    pictures: Part
    training: Part | None
    autoencoder: AutoencoderKL | None
    autoencoder_hash: str | None

    def references(self, dealer: Dealer) -> References:
        """Return what a judge saw of the pictures, measured once."""
        return References(self.judge, dealer, default_folder(), self.autoencoder, self.autoencoder_hash)


def held_out_of(recipe: Recipe, model: nn.Module, network: dict[str, Any], shards: ShardSet) -> Part:
    """Return the held-out samples of a recipe; ConfigError where they are not of the kind of `shards`."""
    section = recipe.evaluation
    assert section is not None
    held_out = _opened("held_out", section.held_out, shards.label)
    if held_out.fingerprint == shards.fingerprint:
        raise ConfigError(
            f"evaluation.held_out: {section.held_out} holds what the run is trained on; give samples that it "
            "does not see (`driftmap shards make --held-out` keeps some back)"
        )
    for made in ("latents", "text"):
        theirs, ours = (_encoder(each, made) for each in (held_out, shards))
        if theirs != ours:
            raise ConfigError(
                f"evaluation.held_out: the {made} of {section.held_out} were made by the encoder {theirs}, "
                f"those of the training data by {ours}; encode the held-out samples as these were"
            )
    check_data(model, network, held_out, name="evaluation.held_out: the model")
    check_trajectories(recipe.objective, model, held_out, place="evaluation.held_out")
    return Part(held_out, min(section.num_samples, held_out.num_samples))


def gallery_of(
    recipe: Recipe, model: nn.Module, shards: ShardSet, held_out: Part, *, device: torch.device
) -> Gallery | None:
    """Return what samples are compared by and with, None where no features are named."""
    section = recipe.evaluation
    assert section is not None
    if section.features is None:
        return None
    if not isinstance(model, FlowMap):
        raise ConfigError(
            f"evaluation.features: the objective {objective_name(recipe.objective)!r} makes no samples to "
            "compare; remove it, the held-out loss stays"
        )
    try:
        cost = getattr(guided(model, section.guidance), "evaluations", 1)
    except ConfigError as error:
        raise ConfigError(f"evaluation.guidance: {error}") from error
    if odd := [nfe for nfe in section.nfe if nfe % cost]:
        raise ConfigError(
            f"evaluation: nfe {odd[0]} is odd, but each step of guided samples takes 2 evaluations"
        )
    label = CLASS if shards.label == CAPTION else shards.label  # a caption tells the class, too
    asked = Part(held_out.shards.labelled_by(label), held_out.size)
    pictures = Part(_pictures_of(section, shards, held_out).labelled_by(label), held_out.size)
    try:
        judge = _judge(section, asked, device=device, conditional=model.null_condition is not None)
        pictures.shape  # noqa: B018 - raises where they are no pictures
    except ValueError as error:
        raise ConfigError(f"evaluation.features: {error}") from error
    found = None if isinstance(shards, ShardStream) else shards
    if MADE & shards.info.keys():
        found = pictures_behind(shards, [*makers(shards), Path(section.features)])
    training = None if found is None else Part(found.labelled_by(label), pictures.size)
    if "latents" not in shards.info:
        return Gallery(judge, asked, pictures, training, None, None)
    autoencoder = autoencoder_of(shards)
    made_by = fingerprint(autoencoder)
    nn.Module.to(autoencoder, device)  # diffusers' own is not typed
    return Gallery(judge, asked, pictures, training, autoencoder, made_by)


def _pictures_of(section: EvaluationSection, shards: ShardSet, held_out: Part) -> ShardSet:
    """Return the held-out pictures: the samples themselves, or what these were made of."""
    if not MADE & shards.info.keys():
        if section.pictures is not None:
            raise ConfigError("evaluation.pictures: has no effect, as held_out holds no latents; remove it")
        return held_out.shards
    if section.pictures is None:
        raise ConfigError(
            "evaluation.pictures: is needed, as held_out holds none; give those that it was made of"
        )
    pictures = _opened("pictures", section.pictures, CLASS)
    if pictures.fingerprint != held_out.shards.info.get("encoded_from"):
        raise ConfigError(
            f"evaluation.pictures: {section.held_out} was not encoded from {section.pictures}; give the "
            "pictures it was encoded from, or encode these"
        )
    return pictures


def _judge(section: EvaluationSection, asked: Part, *, device: torch.device, conditional: bool) -> Judge:
    """Return the judge of the named features; a classifier that knows the classes tells them, too."""
    assert section.features is not None
    run = Path(section.features)
    features = features_named(section.features, device=device)
    knows = run.is_dir() and run_recipe(run)["data"].get("label", CLASS) == asked.shards.label
    told = knows and conditional and asked.shards.label_numbers
    return Judge(features, classifier_of(run).to(device) if told else None)


def _encoder(shards: ShardSet, made: str) -> str | None:
    """Return the hash of what encoded the latents, or the text, of a data set."""
    return shards.info.get("encoder") if made == "latents" else shards.info.get("text", {}).get("encoder")


def _opened(name: str, place: str | Path, label: str) -> ShardSet:
    try:
        return ShardSet.open(place).labelled_by(label)
    except (ValueError, OSError) as error:
        raise ConfigError(f"evaluation.{name}: {error}") from error
