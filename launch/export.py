"""A run as a diffusers pipeline folder, and the proof that it gives the trainer's samples without driftmap.

OUT/model_index.json  pipeline.py           the pipeline, trust_remote_code=True, and driftmap_layers.py
    transformer/      config, safetensors, driftmap_dit.py and what it imports, driftmap_layers.py; or
    unet/             diffusers' UNet2DConditionModel
    scheduler/        diffusers' FlowMapEulerDiscreteScheduler
    vae/              diffusers' AutoencoderKL with the latents' scale
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler, ModelMixin, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ..models import layers, pipeline
from ..models.backbones.unet import UNet
from ..models.condition import Text
from ..models.denoiser import Denoiser
from ..models.flow_map import FlowMap
from ..models.samplers import jump, time_grid
from ..trainer.build import load_model, shards_of_run
from ..trainer.config import ConfigError
from ..trainer.encode import autoencoder_of
from ..trainer.evaluate import sample_noise

TOLERANCE = 1e-5  # of latents of unit variance

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
images = pipe(**common, output_type="pt").images
save_file({"latents": pipe(**common, output_type="latent").images, "images": images.contiguous()}, outputs)
"""


def export(run: Path, out: Path, *, autoencoder: Path | None = None, shift: float = 1.0) -> Path:
    """Write the EMA weights of a run as a pipeline folder, whole or not at all; return the folder.

    `shift` is that of the grid of times that the pipeline samples along.
    """
    model = load_model(run)
    if isinstance(model, Denoiser):
        raise ConfigError(
            f"the network of {run} predicts {model.prediction}, and the pipeline jumps by a mean velocity; "
            "distil it into a flow map with a network of its own, and export that"
        )
    if not isinstance(model, FlowMap) or not isinstance(model.backbone, ModelMixin | UNet):
        raise ConfigError(
            f"{run} holds no model that diffusers can load; export takes flow maps of a DiT or a U-Net"
        )
    if out.exists() and not (out / "model_index.json").is_file():
        raise ConfigError(f"{out} exists and is no exported pipeline; give a new folder")
    shards = shards_of_run(run)
    vae = autoencoder_of(shards, autoencoder) if "latents" in shards.info else None
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write(aside, model.backbone, vae, shards.label_names)
    FlowMapEulerDiscreteScheduler(shift=shift).save_pretrained(aside / "scheduler")
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        os.rename(out, old)
    os.rename(aside, out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _write(folder: Path, backbone: ModelMixin | UNet, vae: AutoencoderKL | None, classes: list[str]) -> None:
    components: dict[str, list[str] | list[None]] = {"transformer": [None, None], "unet": [None, None]}
    if isinstance(backbone, UNet):
        backbone.stock().save_pretrained(folder / "unet")
        components["unet"] = ["diffusers", UNet2DConditionModel.__name__]
    else:
        backbone.save_pretrained(folder / "transformer")
        module = f"driftmap_{Path(inspect.getfile(type(backbone))).stem}"
        _copy(inspect.getfile(type(backbone)), folder / "transformer" / f"{module}.py")
        components["transformer"] = [module, type(backbone).__name__]
    _copy(inspect.getfile(pipeline), folder / "pipeline.py")
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
    }
    if classes:
        index["id2label"] = {str(number): name for number, name in enumerate(classes)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy(source: str, file: Path) -> None:
    """Copy a module, and beside it the one that it imports of driftmap, `layers`."""
    text = re.sub(r"from \.+layers import", "from .driftmap_layers import", Path(source).read_text())
    file.write_text(text)
    shutil.copy(inspect.getfile(layers), file.with_name("driftmap_layers.py"))


def check_export(
    folder: Path, run: Path, *, num_samples: int = 8, steps: int = 4, seed: int = 0, shift: float = 1.0
) -> float:
    """Return the largest difference between the trainer's samples and those of the folder in a fresh process.

    Raises ValueError if it is above TOLERANCE.

    The process cannot import driftmap. Latents are compared; pictures follow from them by the same
    autoencoder.
    """
    model = load_model(run)
    assert isinstance(model, FlowMap)
    noise = sample_noise(num_samples, model.sample_shape, seed=seed)
    condition = model.any_condition(num_samples)
    ours = jump(model, noise, grid=time_grid(steps, shift=shift), condition=condition)
    given = {"noise": noise, "steps": torch.tensor(steps)}
    if isinstance(condition, Text):
        given |= {"prompt_embeds": condition.tokens, "prompt_mask": condition.mask}
    elif condition is not None:
        given |= {"class_labels": condition}
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file(given, inputs)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        command = [sys.executable, "-c", _LOAD_AND_SAMPLE, str(folder.resolve()), str(inputs), str(outputs)]
        done = subprocess.run(
            command, env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{folder} does not load in a fresh process:\n{done.stderr}")
        theirs = load_file(outputs)["latents"]
    difference = (ours - theirs).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(
            f"{folder} gives other samples than {run}: they differ by {difference:.1e}; export it again"
        )
    return difference
