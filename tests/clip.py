"""A small CLIP with random weights, in the files that a real one has."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from small_encoder import SMALL, WORDS, write_encoder


def write_clip(folder: Path) -> str:
    """Write a CLIP of 16 x 16 pixels and of captions of up to 8 tokens; it knows WORDS."""
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=8, **marks, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    torch.manual_seed(0)
    return write_encoder(folder, CLIPModel(config))
