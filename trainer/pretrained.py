"""A model that starts from a diffusers checkpoint: its network's settings, and what it means."""

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ..data.shards import ShardSet
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap
from ..models.path import Prediction
from ..models.pretrained import Pretrained
from ..models.prompt_encoder import prompt_encoder_of
from .config import ConfigError
from .meaning import PLAIN, in_one_line, meaning_after, path_of
from .objective import Batch
from .pretrained_section import PretrainedSection
from .published import is_published, model_of_published, settings_of_published
from .recipe import Recipe
from .rule import Rule
from .start import make_network
from .tuning import fill, fingerprint_of, opened

LEVEL_TOLERANCE = 1e-5


def learns_jumps(objective: Any) -> bool:
    """Return whether an objective trains a network of two times."""
    return isinstance(objective, Rule) or hasattr(objective, "fake_network")


def network_settings_of(found: Pretrained, section: PretrainedSection, *, two_times: bool) -> dict[str, Any]:
    """Return the settings of a checkpoint's network, as network.json has them, without `means`."""
    settings = {name: v for name, v in found.config.items() if not name.startswith("_")}
    settings["_class_name"] = found.config["_class_name"]
    shared = {"timesteps": found.timesteps, "first_timestep": found.first_timestep, "two_times": two_times}
    if found.backbone == "stock_dit":
        if section.guidance_input:
            raise ConfigError("model.guidance_input: a DiT of a checkpoint takes none; remove it")
        classes = settings.get("num_embeds_ada_norm", 1000)
        return {"name": found.backbone, "settings": settings, "num_classes": classes, **shared}
    text_width, max_tokens = 0, 0
    if found.config["_class_name"] == "UNet2DConditionModel":
        added = settings.get("addition_embed_type") == "text_time"
        text_width, max_tokens = settings["cross_attention_dim"], 77 + added
        encoder = prompt_encoder_of(found)
        if encoder is not None:
            max_tokens = encoder.max_tokens
    shared |= {"guidance_input": section.guidance_input, "text_width": text_width, "max_tokens": max_tokens}
    return {"name": found.backbone, "settings": settings, **shared}


def meaning_of_checkpoint(found: Pretrained) -> dict[str, Any]:
    """Return what a checkpoint's network means; ConfigError where diffusers makes another path of it."""
    said = found.meaning()
    if said["prediction"] != PLAIN:
        path: Any = path_of(said["path"])
        gap = (path.alpha_bar - found.levels().double()).abs().max().item()
        if gap > LEVEL_TOLERANCE:
            raise ConfigError(
                f"{found.place}: the noise levels of its scheduler differ from those of {said['path']} by "
                f"{gap:.1e}; give one whose betas are linear, scaled_linear or squaredcos_cap_v2"
            )
        said["path"] = TypeAdapter(type(path)).dump_python(path, mode="json")
    else:
        said["path"] = {"name": "linear"}
    return said | {"data_std": 1.0, "variance": "learned" if found.learned_variance else "fixed"}


def of_checkpoint(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that a recipe's `from_pretrained` starts from, and its network's settings."""
    section = TypeAdapter(PretrainedSection).validate_python(recipe.model)
    found = opened(section.from_pretrained, section.subfolder, key="model.from_pretrained")
    if recipe.objective.model_kind != "flow_map":
        raise ConfigError(
            f"model.from_pretrained: {found.place} is a flow_map, but the objective trains a "
            f"{recipe.objective.model_kind}"
        )
    two_times = learns_jumps(recipe.objective)
    _check_channels(found)
    try:
        network = network_settings_of(found, section, two_times=two_times)
        old = meaning_of_checkpoint(found)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.from_pretrained: {error}") from error
    means: Any = meaning_after(old, recipe.objective, source=found.place)
    network["means"], path = means, means["path"]
    if path != old["path"]:
        raise ConfigError(
            f"objective.path: {in_one_line(path)}, but the network of {found.place} was trained along "
            f"another one; set it to {in_one_line(old['path'])}, or leave it out"
        )
    network["source"] = TypeAdapter(PretrainedSection).dump_python(section, mode="json")
    if some := section.lora is not None or len(section.train) > 0:
        network["source"]["weights"] = fingerprint_of(found.weights(section.variant))
    try:
        model: Any = make_network(network)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.from_pretrained: {found.place}: {error}") from error
    if not some:
        fill(model.backbone, found, section.variant)
    _listen(model.backbone, found, section.empty_prompt)
    return model, network


def model_of_checkpoint(place: Path | str) -> FlowMap:
    """Return the network of a checkpoint with one time, frozen: a teacher, or what to compare with."""
    if is_published(place):
        return model_of_published(place)
    found = opened(str(place), None, key="run")
    model: Any = make_network(settings_of_checkpoint(place))
    fill(model.backbone, found, None)
    _listen(model.backbone, found, "")
    return model.eval().requires_grad_(False)


def settings_of_checkpoint(place: Path | str) -> dict[str, Any]:
    """Return the settings of a checkpoint's network, what it means included."""
    if is_published(place):
        return settings_of_published(place)
    found = opened(str(place), None, key="run")
    section = PretrainedSection(from_pretrained=str(place))
    return network_settings_of(found, section, two_times=False) | {"means": meaning_of_checkpoint(found)}


def _listen(backbone: Any, found: Pretrained, prompt: str) -> None:
    """Let a network that reads prompts know the one that says nothing."""
    if not backbone.text_width or backbone.nothing.device.type == "meta":
        return
    encoder = prompt_encoder_of(found)
    if encoder is None:
        raise ConfigError(
            f"model.from_pretrained: {found.place} has no text_encoder, so what an empty prompt is to its "
            "network is unknown; copy text_encoder and tokenizer from where the network comes from"
        )
    if encoder.width != backbone.text_width:
        raise ConfigError(
            f"model.from_pretrained: the text encoder of {found.place} is {encoder.width} wide, but its "
            f"network reads prompts of width {backbone.text_width}; copy both from one place"
        )
    backbone.nothing.copy_(encoder.nothing(prompt))


def check_latents(model: dict[str, Any], shards: ShardSet) -> None:
    """Raise ConfigError where latents or prompts are not what a checkpoint's network knows."""
    from .encode import text_fingerprint  # it reads runs, which start from what is here

    if "from_pretrained" not in model:
        return
    found = opened(model["from_pretrained"], model.get("subfolder"), key="model.from_pretrained")
    text, encoder = shards.info.get("text"), prompt_encoder_of(found)
    if text is not None and encoder is not None and text["encoder"] != text_fingerprint(encoder):
        raise ConfigError(
            f"data.shards: the captions in {shards.folder} were encoded by {text['name']}, not by the text "
            f"encoder of {found.place}; encode them with the checkpoint as --text-encoder"
        )
    vae, made = found.autoencoder, shards.info.get("latents")
    if vae is None or made is None:
        return
    wanted = vae.get("scaling_factor", 1.0), vae.get("shift_factor") or 0.0
    has = made["scaling_factor"], made["shift_factor"]
    if any(abs(a - b) > 1e-6 for a, b in zip(wanted, has, strict=True)):
        raise ConfigError(
            f"data.shards: the latents in {shards.folder} have scale {has[0]:.5g} and shift {has[1]:.5g}, "
            f"but the network of {found.place} knows them by {wanted[0]:.5g} and {wanted[1]:.5g}; encode the "
            "pictures with the checkpoint as --autoencoder"
        )


def _check_channels(found: Pretrained) -> None:
    """Raise ConfigError where a network takes other channels than its autoencoder gives."""
    vae, channels = found.autoencoder, found.config["in_channels"]
    if vae is not None and vae.get("latent_channels", channels) != channels:
        raise ConfigError(
            f"model.from_pretrained: the network of {found.place} takes {channels} channels, but its "
            f"autoencoder gives {vae['latent_channels']}: an inpainting network takes a mask, "
            "too, and cannot be trained"
        )


@torch.no_grad()
def check_prediction(model: nn.Module, batch: Batch) -> None:
    """Raise ConfigError where a network plainly predicts something else than its scheduler says.

    At equal parts of data and noise, what it says is read in each way. It is refused where the noise is
    missed by more than half of its variance in the way that is said, and by a quarter of that in another.
    """
    if not isinstance(model, Denoiser):
        return
    count = len(batch.data)
    t = model.path.time(torch.full((count,), math.pi / 4))
    noise = batch.random.normal("labelled", tuple(batch.data.shape[1:]))
    x = model.path.state(batch.data, noise, t)
    said = model.predict(x, t, t, batch.condition)[:, : x.shape[1]]
    ways: tuple[Prediction, ...] = ("noise", "v", "data")
    errors = {
        way: (model.path.end_points(x, said, t, kind=way)[1] - noise).square().mean().item() for way in ways
    }
    best = min(errors, key=lambda way: errors[way])
    now = errors[model.prediction]
    if now > 0.5 and errors[best] < now / 4:
        raise ConfigError(
            f"model.from_pretrained: by its scheduler the network predicts {model.prediction}, which misses "
            f"the noise of {count} samples by {now:.2f} of its variance, but read as {best} it misses it by "
            f"{errors[best]:.2f}; correct prediction_type in scheduler/scheduler_config.json"
        )
