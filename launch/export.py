"""A run as a diffusers pipeline folder, and the proof that it gives the trainer's samples without driftmap.

OUT/model_index.json  pipeline.py           the pipeline, trust_remote_code=True
    transformer/      config, safetensors, driftmap_dit.py with all that it needs; or
    unet/             diffusers' UNet2DConditionModel
    scheduler/        diffusers' FlowMapEulerDiscreteScheduler, with the shift and what is recommended
    vae/              diffusers' AutoencoderKL with the latents' scale
    network.json      what the network is, for a config that names the pipeline as its teacher

A variant is the network once more, in half precision: `from_pretrained(..., variant="fp16")`.
The recommended steps and guidance are what the pipeline does by default, by its own config; the scheduler's
has them for code that uses it without the pipeline. The grid begins at noise, t_max = 1, in every model.
"""

import copy
import inspect
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler, ModelMixin, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ..models import pipeline
from ..models.backbones.unet import UNet
from ..models.condition import Text
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap, Process
from ..models.samplers import jump, time_grid
from ..trainer.build import load_model, settings_of_run, shards_of_run
from ..trainer.checkpoint import load_weights
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of
from ..trainer.evaluate import sample_noise
from ..trainer.published import NETWORK
from ..trainer.tuning import merge_adapters
from .export_pretrained import check_pretrained, export_pretrained, is_of_checkpoint
from .pipeline_folder import copy_module, recommend, replace_folder, run_alone

TOLERANCE = 1e-5  # of latents of unit variance
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What is exported of a run, and what the pipeline does by default.

    `weights` are `ema`, `model`, or the safetensors file of a mean that `driftmap ema` wrote; `shift` is that
    of the grid of times that it samples along; `guidance` is of a network that takes it.
    """

    weights: str = "ema"
    variants: tuple[str, ...] = ()
    autoencoder: Path | None = None
    shift: float = 1.0
    nfe: int = 4
    guidance: float = 1.0
    text_encoder: str | None = None  # where all find the encoder of captions; None: where it was here

    def model_of(self, run: Path) -> FlowMap:
        """Return the flow map of a run with the chosen weights; ConfigError where it cannot be exported."""
        file = Path(self.weights)
        if file.suffix != ".safetensors":
            model = load_model(run, weights=self.weights)
        elif file.is_file():
            model = load_model(run, weights="model")
            load_weights(model, load_file(file), source=file)
        else:
            raise ConfigError(f"--weights {file}: no such file; `driftmap ema` writes one")
        if isinstance(model, Denoiser | Process):
            said = model.prediction if isinstance(model, Denoiser) else "what its own process makes of it"
            raise ConfigError(
                f"the network of {run} predicts {said}, and the pipeline jumps by a mean velocity; "
                "distil it into a flow map with a network of its own, and export that"
            )
        if not isinstance(model, FlowMap) or not isinstance(model.backbone, ModelMixin | UNet):
            raise ConfigError(
                f"{run} holds no model that diffusers can load; export takes flow maps of a DiT or a U-Net"
            )
        if self.guidance != 1 and not model.takes_guidance:
            raise ConfigError(
                f"--guidance {self.guidance:g}: {run} takes no scale of guidance; leave it out, its "
                "teacher's is what it was"
            )
        merge_adapters(model.backbone)
        return model


_LOAD_AND_SAMPLE = """
import sys
sys.modules["driftmap"] = None  # an import of driftmap fails from here on
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, inputs, outputs = sys.argv[1:]
given = load_file(inputs)
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
steps = int(given.pop("steps"))
noise = given.pop("noise")
common = dict(latents=noise, num_images=len(noise), num_inference_steps=steps, **given)
if "class_labels" in given:
    common["class_labels"] = given["class_labels"].tolist()
if "guidance_scale" in given:
    common["guidance_scale"] = given["guidance_scale"].item()
images = pipe(**common, output_type="pt").images
save_file({"latents": pipe(**common, output_type="latent").images, "images": images.contiguous()}, outputs)
"""


def export(run: Path, out: Path, chosen: Exported | None = None) -> Path:
    """Write a run as a pipeline folder, whole or not at all; return the folder."""
    chosen = chosen or Exported()
    if is_of_checkpoint(run):
        if replace(chosen, weights="ema", nfe=4) != Exported():
            raise ConfigError(
                f"{run} started from a checkpoint of diffusers, whose pipeline it is exported as: shift, "
                "guidance, variants, the autoencoder and the text encoder are that one's; leave them out"
            )
        return export_pretrained(run, out, weights=chosen.weights, nfe=chosen.nfe)
    model = chosen.model_of(run)
    if out.exists() and not (out / "model_index.json").is_file():
        raise ConfigError(f"{out} exists and is no exported pipeline; give a new folder")
    shards = shards_of_run(run)
    vae = autoencoder_of(shards, chosen.autoencoder) if "latents" in shards.info else None
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config: dict[str, Any] = {"num_inference_steps": chosen.nfe, "guidance_scale": chosen.guidance}
    if shards.label_names:
        config["id2label"] = {str(number): name for number, name in enumerate(shards.label_names)}
    if model.text_width:
        text = shards.info["text"]
        config["caption_encoder"] = {
            "name": chosen.text_encoder or text["name"],
            "max_tokens": text["max_tokens"],
        }
    _write(aside, model.backbone, vae, config)
    (aside / NETWORK).write_text(json.dumps(settings_of_run(run), indent=1) + "\n")
    for variant in chosen.variants:
        _write_variant(aside, model.backbone, variant)
    FlowMapEulerDiscreteScheduler(shift=chosen.shift).save_pretrained(aside / "scheduler")
    recommend(aside / "scheduler", num_inference_steps=chosen.nfe, guidance_scale=chosen.guidance)
    replace_folder(out, by=aside)
    return out


def _write(
    folder: Path, backbone: ModelMixin | UNet, vae: AutoencoderKL | None, config: dict[str, Any]
) -> None:
    """Write all but the scheduler."""
    components: dict[str, list[str] | list[None]] = {"transformer": [None, None], "unet": [None, None]}
    if isinstance(backbone, UNet):
        backbone.stock().save_pretrained(folder / "unet")
        components["unet"] = ["diffusers", UNet2DConditionModel.__name__]
    else:
        backbone.save_pretrained(folder / "transformer")
        module = f"driftmap_{Path(inspect.getfile(type(backbone))).stem}"
        copy_module(inspect.getfile(type(backbone)), folder / "transformer" / f"{module}.py")
        components["transformer"] = [module, type(backbone).__name__]
    copy_module(inspect.getfile(pipeline), folder / "pipeline.py")
    if vae is not None:
        native = AutoencoderKL.from_config(vae.config)
        assert isinstance(native, AutoencoderKL)
        native.load_state_dict(vae.state_dict())
        native.save_pretrained(folder / "vae")
    index: dict[str, Any] = {
        "_class_name": ["pipeline", pipeline.FlowMapPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        **components,
        "scheduler": ["diffusers", FlowMapEulerDiscreteScheduler.__name__],
        "vae": [None, None] if vae is None else ["diffusers", AutoencoderKL.__name__],
        **config,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_variant(folder: Path, backbone: ModelMixin | UNet, variant: str) -> None:
    """Write the weights of the network once more, in half precision."""
    if variant not in VARIANTS:
        raise ConfigError(f"--variant {variant}: expected one of {', '.join(VARIANTS)}")
    native: Any = backbone.stock() if isinstance(backbone, UNet) else backbone
    place = folder / ("unet" if isinstance(backbone, UNet) else "transformer")
    half = copy.deepcopy(native)
    torch.nn.Module.to(half, VARIANTS[variant])  # diffusers' own warns of what it keeps in fp32, here nothing
    half.save_pretrained(place, variant=variant)


def check_export(
    folder: Path,
    run: Path,
    chosen: Exported | None = None,
    *,
    num_samples: int = 8,
    steps: int = 4,
    seed: int = 0,
) -> float:
    """Return the largest difference between the trainer's samples and those of the folder in a fresh process.

    Raises ValueError if it is above TOLERANCE.

    The process cannot import driftmap. Latents are compared; pictures follow from them by the same
    autoencoder.
    """
    chosen = chosen or Exported()
    if is_of_checkpoint(run):
        return check_pretrained(folder, run, weights=chosen.weights)
    model = chosen.model_of(run)
    noise = sample_noise(num_samples, model.sample_shape, seed=seed)
    condition = model.any_condition(num_samples)
    given: dict[str, torch.Tensor] = {"noise": noise, "steps": torch.tensor(steps)}
    if model.takes_guidance:
        model = model.at_guidance(2.0)
        given |= {"guidance_scale": torch.tensor(model.scale)}
    ours = jump(model, noise, grid=time_grid(steps, shift=chosen.shift), condition=condition)
    if isinstance(condition, Text):
        given |= {"prompt_embeds": condition.tokens, "prompt_mask": condition.mask}
    elif isinstance(condition, torch.Tensor):
        given |= {"class_labels": condition}
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file(given, inputs)
        places = (str(folder.resolve()), str(inputs), str(outputs))
        run_alone(_LOAD_AND_SAMPLE, *places, scratch=scratch, what=str(folder))
        theirs = load_file(outputs)["latents"]
    difference = (ours - theirs).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(
            f"{folder} gives other samples than {run}: they differ by {difference:.1e}; export it again"
        )
    return difference
