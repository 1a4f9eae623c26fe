"""Pictures and prompts are encoded for a checkpoint's network by the checkpoint's own encoders."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny, DiffusionPipeline
from PIL import Image
from tiny_pipelines import PROMPTS, write_pipeline

from driftmap.data.batch import ordered
from driftmap.data.decode import floats
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.launch.sampling import SamplingRequest, sample_run
from driftmap.models.autoencoder import decode_latents
from driftmap.models.stock_autoencoder import load_stock_autoencoder
from driftmap.trainer.build import train
from driftmap.trainer.config import read_config
from driftmap.trainer.encode import Captions, autoencoder_of, encode, text_encoder_of
from driftmap.trainer.recipe import recipe_from
from runs import write_config

TINY: dict[str, Any] = {
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.7,
    ),
    "AutoencoderDC": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), scaling_factor=0.3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Return shards of 16 px pictures with captions; the second one is a crop of a larger one."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number, prompt in enumerate(PROMPTS[:4]):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
            fields = {"original_height": 40, "original_width": 30, "crop_top": 3, "crop_left": 2}
            members = {"png": buffer.getvalue(), "txt": prompt.encode()}
            members["json"] = json.dumps(fields if number == 1 else {}).encode()
            writer.write(f"{number}", members)
    return index_shards(folder)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@torch.no_grad()
def test_latents_and_prompts_are_those_of_the_pipeline(kind: str, pictures: ShardSet, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / kind, kind)
    made = encode(pictures, tmp_path / "made", autoencoder=folder, captions=Captions(str(folder)))
    latents = made.info["latents"]
    assert (latents["scaling_factor"], latents["shift_factor"]) == (0.5, 0.0)
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    batch = next(ordered(made.labelled_by("text"), 4))
    pixels = floats(next(ordered(pictures, 4))["data"])
    mean = pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(batch["mean"].float(), mean, rtol=2e-3, atol=2e-3)
    prompts = PROMPTS[:4]
    if kind == "sd":
        expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    else:
        expected, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        front, batch["text"] = batch["text"][:, 0].float(), batch["text"][:, 1:]
        torch.testing.assert_close(front[:, :8], pooled, rtol=2e-3, atol=2e-3)
        assert front[:2, 8:14].tolist() == [[16, 16, 0, 0, 16, 16], [40, 30, 3, 2, 16, 16]]
    torch.testing.assert_close(batch["text"].float(), expected, rtol=2e-3, atol=2e-3)
    assert batch["text_mask"].all()
    assert text_encoder_of(made).max_tokens == batch["text_mask"].shape[1]
    assert autoencoder_of(made).config["scaling_factor"] == 0.5


def test_a_run_is_sampled_by_prompts_and_guided(pictures: ShardSet, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "sd", "sd")
    encode(pictures, tmp_path / "made", autoencoder=folder, captions=Captions(str(folder)))
    settings: dict[str, Any] = {"data__label": "text", "data__batch_size": 4, "training__steps": 2}
    settings |= {"model": {"from_pretrained": str(folder)}, "objective": {"name": "ddpm"}}
    file = write_config(tmp_path / "c.yaml", tmp_path / "made", **settings)
    train(recipe_from(read_config(file)), tmp_path / "run")

    def sampled(**more: Any) -> bytes:
        request = SamplingRequest(tmp_path / "run", nfe=2, count=2, **more)
        sample_run(request, tmp_path / "samples.png")
        return (tmp_path / "samples.png").read_bytes()

    cat = sampled(prompts=("a red cat",))
    assert cat == sampled(prompts=("a red cat",))
    assert len({cat, sampled(prompts=("a dog",)), sampled(prompts=("a red cat",), guidance=3.0)}) == 3


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_autoencoders_of_other_classes(kind: str, pictures: ShardSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = TINY[kind]().eval()
    theirs.save_pretrained(tmp_path / "vae")
    made = encode(pictures, tmp_path / "made", autoencoder=tmp_path / "vae")
    batch = next(ordered(made, 4))
    pixels = floats(next(ordered(pictures, 4))["data"])
    latents = theirs.encode(pixels, return_dict=False)[0]
    assert not batch["std"].any()
    torch.testing.assert_close(batch["mean"].float(), latents, rtol=2e-3, atol=2e-3)
    scale = theirs.config["scaling_factor"]
    assert made.info["latents"]["scaling_factor"] == scale
    decoded = decode_latents(autoencoder_of(made), latents * scale)
    torch.testing.assert_close(decoded, theirs.decode(latents).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_what_is_no_autoencoder_is_told(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "dit", "dit")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(
        ValueError, match="holds a AutoencoderKLWan; expected one of AutoencoderKL, Autoencoder"
    ):
        load_stock_autoencoder(folder)
    with pytest.raises(
        ValueError, match="has no autoencoder of diffusers; give a pipeline folder, or its vae"
    ):
        load_stock_autoencoder(folder / "transformer")
