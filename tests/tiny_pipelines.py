"""Tiny pipelines of diffusers' real classes, with random weights, saved by diffusers itself."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.models.pretrained import Pretrained
from driftmap.models.prompt_encoder import prompt_encoder_of
from driftmap.trainer.encode import text_fingerprint
from small_encoder import WORDS, write_tokenizer

CLIP: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": len(WORDS),
}
CLIP |= {"max_position_embeddings": 12, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2}
UNET: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
UNET |= {"norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
LEVELS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
LEVELS |= {"set_alpha_to_one": False, "steps_offset": 1}


def moved(net: Any) -> Any:
    """Return a network none of whose weights is zero, which would hide mistakes."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval()


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    )  # fmt: skip


def text_encoder(width: int, kind: Any = transformers.CLIPTextModel) -> Any:
    return kind(transformers.CLIPTextConfig(hidden_size=width, projection_dim=8, **CLIP)).eval()


def tokenizer(folder: Path) -> Any:
    write_tokenizer(folder / "words")
    return transformers.AutoTokenizer.from_pretrained(folder / "words")


def stable_diffusion(folder: Path, **scheduler: Any) -> StableDiffusionPipeline:
    kind: Any = UNet2DConditionModel
    unet = kind(**UNET, in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=2)
    words = tokenizer(folder)
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(16), tokenizer=words, unet=moved(unet),
        scheduler=DDIMScheduler(**(LEVELS | scheduler)), safety_checker=None, feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    kind: Any = UNet2DConditionModel
    unet = kind(
        **UNET, in_channels=4, out_channels=4, cross_attention_dim=24, attention_head_dim=(1, 2),
        use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    words = tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(8), tokenizer=words, tokenizer_2=words,
        text_encoder_2=text_encoder(16, transformers.CLIPTextModelWithProjection),
        unet=moved(unet), scheduler=DDIMScheduler(**LEVELS),  # pyright: ignore
    )  # fmt: skip


def dit(folder: Path) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=5,
    )  # fmt: skip
    scheduler: Any = DDIMScheduler(clip_sample=False)
    return DiTPipeline(moved(transformer), autoencoder(), scheduler, id2label={0: "cat", 1: "dog"})


def ddpm(folder: Path) -> DDPMPipeline:
    kind: Any = UNet2DModel
    unet = kind(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        freq_shift=1, flip_sin_to_cos=False, mid_block_scale_factor=1.4, downsample_padding=0,
    )  # fmt: skip
    return DDPMPipeline(moved(unet), DDPMScheduler(clip_sample=False))


KINDS = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "dit": dit, "ddpm": ddpm}


def write_pipeline(folder: Path, kind: str, **settings: Any) -> Path:
    """Save a tiny pipeline, and return its folder."""
    torch.manual_seed(0)
    made = KINDS[kind](folder.with_name(f"{folder.name}.parts"), **settings)
    made.save_pretrained(folder)
    return folder


PROMPTS = ["a big red cat", "the small green dog", "a dog", "the red cat and the green dog", ""]


def write_shards(folder: Path, checkpoint: Path, *, n: int = 40) -> ShardSet:
    """Write random samples of the kind that a tiny checkpoint's network takes, with its conditions."""
    found = Pretrained.open(str(checkpoint))
    generator = np.random.default_rng(0)
    encoder, info = prompt_encoder_of(found), {}
    captions = [] if encoder is None else [tokens.half().numpy() for tokens in encoder(PROMPTS)]
    if encoder is not None:
        text = {
            "name": str(checkpoint),
            "encoder": text_fingerprint(encoder),
            "max_tokens": encoder.max_tokens,
        }
        info |= {"text": text | {"width": encoder.width}}
    if found.autoencoder is not None:
        info |= {"latents": {"scaling_factor": 0.5, "shift_factor": 0.0, "autoencoder": str(checkpoint)}}
    with ShardWriter(folder) as writer:
        for number in range(n):
            mean = generator.standard_normal((found.config["in_channels"], 8, 8)) + number % 2
            moments = np.stack([mean, np.full_like(mean, 0.1)]).astype(np.float32)
            members = {"moments.npy": npy_bytes(moments), "cls": str(number % 2).encode()}
            if captions:
                members["text.npy"] = npy_bytes(captions[number % len(captions)])
            writer.write(f"{number:03d}", members)
    return index_shards(folder, info=info)


def section(kind: str) -> dict[str, Any]:
    """Return what a config's data section says of the condition."""
    return {"label": "text"} if kind in ("sd", "sdxl") else {}
