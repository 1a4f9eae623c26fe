"""A run that started from a diffusers checkpoint, as the checkpoint's pipeline with its own network.

What has one time is the pipeline that it was, and stock diffusers loads it. A student has two: a U-Net is
still diffusers' class, and `pipeline.py` tells it the gap (trust_remote_code=True); a DiT brings its class
along. Adapters (LoRA) are merged into the network, and stand as diffusers' LoRA file in `lora/` besides; of
a student that file is a part only, for the input of the gap is no adapter: its merged pipeline is the whole.
A student's scheduler says how many steps and which guidance are the default. Its grid is even
and begins at t_max = 1, so neither a shift nor a t_max is said.
"""

import inspect
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from ..models.backbones import stock_dit
from ..models.condition import Condition, Text
from ..models.denoiser import Denoiser
from ..models.pretrained import Pretrained
from ..models.samplers import jump, time_grid
from ..trainer.build import load_model, settings_of_run
from ..trainer.config import ConfigError
from ..trainer.tuning import lora_weights, merge_adapters, opened
from .pipeline_folder import copy_module, recommend, replace_folder, run_alone

TOLERANCE = 1e-5  # of the largest number: a prediction of noise is divided by alpha(1), 0.07
# A checkpoint's scheduler in the form whose steps are a denoiser's jumps along an even grid.
EVEN = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 0}
PIPELINES = {
    "StableDiffusionPipeline": "FlowMapStableDiffusionPipeline",
    "StableDiffusionXLPipeline": "FlowMapStableDiffusionXLPipeline",
    "DDPMPipeline": "FlowMapDDIMPipeline",
    "DDIMPipeline": "FlowMapDDIMPipeline",
    "DiTPipeline": "FlowMapDiTPipeline",
}
NOT_COPIED = ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.onnx*", "*.h5")

_LOAD_AND_SAMPLE = """
import sys
sys.modules["driftmap"] = None  # an import of driftmap fails from here on
import json
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

def sample(folder, inputs, outputs, even, trusted):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trusted)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **even)
    last, step = [], pipe.scheduler.step
    def noted(*args, **kwargs):
        found = step(*args, **kwargs)
        last[:] = [found[0] if isinstance(found, tuple) else found.prev_sample]
        return found
    pipe.scheduler.step = noted
    given = load_file(inputs)
    steps, count = int(given.pop("steps")), int(given.pop("count"))
    common = dict(num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(0))
    if "class_labels" in given:
        common["class_labels"] = given.pop("class_labels").tolist()
    elif not given:
        common["batch_size"] = count
    if type(pipe).__name__ == "DiTPipeline" or "prompt_embeds" in given:
        common["guidance_scale"] = 1.0
    pipe(**common, **given)
    save_file({"x": last[0].contiguous()}, outputs)

for job in json.loads(sys.argv[1]):
    sample(*job)
"""


def is_of_checkpoint(run: Path) -> bool:
    """Return whether a run started from a diffusers checkpoint."""
    return "from_pretrained" in settings_of_run(run).get("source", {})


def export_pretrained(run: Path, out: Path, *, weights: str = "ema", nfe: int = 4) -> Path:
    """Write a run as the pipeline of the checkpoint that it started from, whole or not at all.

    A student takes `nfe` steps by default; what has one time takes as many as the checkpoint's pipeline.
    """
    model, source, found = _opened(run, weights)
    backbone = model.backbone
    index = json.loads((found.folder / "model_index.json").read_text())
    if backbone.two_times and index.get("_class_name") not in PIPELINES:
        raise ConfigError(
            f"{found.place} is a {index.get('_class_name')}; students are exported as one of "
            f"{', '.join(sorted(PIPELINES))}"
        )
    if out.exists() and not (out / "model_index.json").is_file():
        raise ConfigError(f"{out} exists and is no exported pipeline; give a new folder")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    part = found.network.name
    for name, value in index.items():
        if (
            isinstance(value, list)
            and value[0] is not None
            and name != part
            and (found.folder / name).is_dir()
        ):
            ignored = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(found.folder / name, aside / name, ignore=ignored)
    if source["lora"] is not None:
        _write_lora(aside / "lora", backbone, source)
        merge_adapters(backbone)
    if backbone.two_times:
        _write_student(aside, backbone, found, index)
        recommend(aside / "scheduler", num_inference_steps=nfe, guidance_scale=1.0)
    else:
        backbone.stock().save_pretrained(aside / part)
    (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    replace_folder(out, by=aside)
    return out


def _opened(run: Path, weights: str) -> tuple[Any, dict[str, Any], Pretrained]:
    model: Any = load_model(run, weights=weights)
    source = settings_of_run(run)["source"]
    found = opened(source["from_pretrained"], source["subfolder"], key=f"{run}")
    if not isinstance(model, Denoiser) and model.backbone.two_times:
        raise ConfigError(f"{run}: students of flow-matching checkpoints cannot be exported yet")
    return model, source, found


def _write_student(folder: Path, backbone: Any, found: Pretrained, index: dict[str, Any]) -> None:
    from ..models import two_time_pipeline  # not above: it imports all that Stable Diffusion needs

    copy_module(inspect.getfile(two_time_pipeline), folder / "pipeline.py")
    index["_class_name"] = ["pipeline", PIPELINES[index["_class_name"]]]
    place = folder / found.network.name
    if isinstance(backbone, stock_dit.StockDiT):
        backbone.save_pretrained(place)
        copy_module(inspect.getfile(stock_dit), place / "driftmap_stock_dit.py")
        index[found.network.name] = ["driftmap_stock_dit", stock_dit.StockDiT.__name__]
    else:
        backbone.stock().save_pretrained(place)
    shutil.rmtree(folder / "scheduler")
    scheduler = DDIMScheduler.from_config(found.scheduler, **EVEN)
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", DDIMScheduler.__name__]
    index["_diffusers_version"] = diffusers.__version__


def _write_lora(folder: Path, backbone: Any, source: dict[str, Any]) -> None:
    """Write adapters as diffusers' `load_lora_weights` reads them, without what else a student learned."""
    folder.mkdir()
    prefix = "transformer" if isinstance(backbone, stock_dit.StockDiT) else "unet"
    found = lora_weights(backbone, source["lora"])
    named = {f"{prefix}.{name}": value.contiguous() for name, value in found.items()}
    save_file(named, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def check_pretrained(folder: Path, run: Path, *, weights: str = "ema") -> float:
    """Return the largest difference between the trainer's samples and those of the folder in a fresh process.

    Raises ValueError if it is above TOLERANCE, relative to the largest number. The process cannot import
    driftmap.
    """
    (difference,) = differences([(folder, run)], weights=weights)
    if difference > TOLERANCE:
        raise ValueError(
            f"{folder} gives other samples than {run}: they differ by {difference:.1e}; export it again"
        )
    return difference


@torch.no_grad()
def differences(
    exported: list[tuple[Path, Path]], *, num_samples: int = 4, steps: int = 4, weights: str = "ema"
) -> list[float]:
    """Return how far the samples of folders are from those of their runs; one fresh process makes all."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs, ours = [], []
        for number, (folder, run) in enumerate(exported):
            model, _, _ = _opened(run, weights)
            noise = torch.randn(num_samples, *model.sample_shape, generator=torch.Generator().manual_seed(0))
            condition, given = _condition(model, num_samples)
            if isinstance(condition, Text):
                given["latents"] = noise
            ours.append(jump(model, noise, grid=time_grid(steps), condition=condition))
            given |= {"steps": torch.tensor(steps), "count": torch.tensor(num_samples)}
            inputs, outputs = (f"{scratch}/{kind}-{number}.safetensors" for kind in ("in", "out"))
            save_file({name: value.contiguous() for name, value in given.items()}, inputs)
            jobs.append([str(folder.resolve()), inputs, outputs, EVEN, model.backbone.two_times])
        folders = ", ".join(str(folder) for folder, _ in exported)
        run_alone(_LOAD_AND_SAMPLE, json.dumps(jobs), scratch=scratch, what=f"{folders}:")
        theirs = [load_file(outputs)["x"] for _, _, outputs, _, _ in jobs]
    return [
        ((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(ours, theirs, strict=True)
    ]


def _condition(model: Any, count: int) -> tuple[Condition | None, dict[str, torch.Tensor]]:
    """Return some conditions, and the same as the pipeline is given them."""
    condition = model.any_condition(count)
    if isinstance(condition, torch.Tensor):
        return condition, {"class_labels": condition}
    if condition is None:
        return None, {}
    tokens, beside = condition.tokens.clone(), {}
    if model.backbone.num_pooled:
        tokens[:, 0, model.backbone.num_pooled :] = model.backbone.nothing[0, model.backbone.num_pooled :]
        beside["pooled_prompt_embeds"] = tokens[:, 0, : model.backbone.num_pooled]
    whole = Text(tokens, torch.ones_like(condition.mask))
    return whole, {"prompt_embeds": tokens[:, bool(beside) :], **beside}
