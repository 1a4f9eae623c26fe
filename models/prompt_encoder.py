"""Prompts to embeddings as a diffusers pipeline makes them: padded to full length, the padding read, too.

The text encoder of Stable Diffusion gives its last hidden state. The two of SDXL give their last but one,
side by side, and there is a token more in front: the second one's pooled embedding, then six numbers of the
picture (height and width of the original, top and left of the crop, height and width of the target).

Source: Podell et al., "SDXL", 2023, sections 2.1 and 2.2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pretrained import Pretrained


@dataclass(frozen=True)
class PromptEncoder:
    """The frozen text encoders of a pipeline; `size` (height, width) is that of pictures, told to SDXL."""

    model: nn.ModuleList
    tokenizers: tuple[Any, ...]
    name: str
    max_tokens: int
    width: int
    size: tuple[int, int]
    zeros_for_empty: bool = False

    @property
    def added(self) -> bool:
        """Whether prompts have the token in front."""
        return len(self.model) == 2

    @property
    def vocabulary(self) -> dict[str, Any]:
        """The number of every token: the same weights mean something else under another one."""
        return {str(number): words.get_vocab() for number, words in enumerate(self.tokenizers)}

    @torch.inference_mode()
    def __call__(
        self, captions: Sequence[str], numbers: Sequence[Sequence[float]] | None = None
    ) -> list[Tensor]:
        """Return the embedding of each prompt, float32 (max_tokens, width), with the numbers of its picture.

        Without numbers, pictures are whole and of the usual size.
        """
        states, pooled = [], None
        for encoder, tokenizer in zip(self.model, self.tokenizers, strict=True):
            told, pooled = self._read(encoder, tokenizer, captions)
            states.append(told)
        found = torch.cat(states, dim=2).float().cpu()
        if not self.added:
            return list(found)
        assert pooled is not None
        told = numbers or [self._usual] * len(captions)
        return [
            torch.cat([self._in_front(row, of_picture), tokens])
            for row, tokens, of_picture in zip(pooled, found, told, strict=True)
        ]

    @property
    def _usual(self) -> tuple[float, ...]:
        return (*self.size, 0, 0, *self.size)

    def nothing(self, prompt: str = "") -> Tensor:
        """Return the embedding (max_tokens, width) of the prompt that says nothing, or a negative one."""
        (found,) = self([prompt])
        if prompt == "" and self.zeros_for_empty:
            return torch.cat([self._in_front(torch.zeros(0), self._usual), torch.zeros_like(found[1:])])
        return found.clone()

    def _read(self, encoder: Any, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(encoder.parameters()).device
        given = {"input_ids": tokens["input_ids"].to(device)}
        if getattr(encoder.config, "use_attention_mask", False):
            given["attention_mask"] = tokens["attention_mask"].to(device)
        said = encoder(**given, output_hidden_states=self.added)
        return (said.hidden_states[-2] if self.added else said[0]), said[0]

    def _in_front(self, pooled: Tensor, numbers: Sequence[float]) -> Tensor:
        """Return the token in front (1, width); an empty `pooled` stands for zeros."""
        pooling: Any = self.model[-1]
        of_prompt = pooled.float().cpu() if len(pooled) else torch.zeros(pooling.config.projection_dim)
        told = torch.cat([of_prompt, torch.tensor(numbers, dtype=torch.float32)])
        return F.pad(told, (0, self.width - len(told)))[None]


def load_prompt_encoder(folder: Path, *, name: str, size: tuple[int, int]) -> PromptEncoder | None:
    """Return the text encoders of a pipeline folder, None where it has none.

    Raises ValueError where they cannot be read from safetensors.
    """
    if not (folder / "text_encoder").is_dir():
        return None
    try:
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise ValueError("text encoders need transformers: pip install 'driftmap[text]'") from error
    parts: list[tuple[str, str, Any]] = [("text_encoder", "tokenizer", CLIPTextModel)]
    if (folder / "text_encoder_2").is_dir():
        parts.append(("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection))
    encoders, tokenizers = [], []
    for weights, words, kind in parts:
        try:
            encoders.append(
                kind.from_pretrained(folder / weights, local_files_only=True, use_safetensors=True).float()
            )
            tokenizers.append(AutoTokenizer.from_pretrained(folder / words, local_files_only=True))
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{folder / weights} is no text encoder that can be loaded: {first}. Expected CLIP's, with "
                f"weights in safetensors, and its {words}"
            ) from error
    index = json.loads((folder / "model_index.json").read_text())
    return PromptEncoder(
        model=nn.ModuleList(encoders).eval().requires_grad_(False),
        tokenizers=tuple(tokenizers),
        name=name,
        max_tokens=tokenizers[0].model_max_length + (len(encoders) == 2),
        width=sum(encoder.config.hidden_size for encoder in encoders),
        size=size,
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", False)) and len(encoders) == 2,
    )


def prompt_encoder_of(found: Pretrained) -> PromptEncoder | None:
    """Return the text encoders beside a checkpoint's network, None where there are none."""
    size = found.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    vae = found.autoencoder
    factor = 2 ** (len(vae["block_out_channels"]) - 1) if vae and "block_out_channels" in vae else 1
    return load_prompt_encoder(found.folder, name=found.place, size=(height * factor, width * factor))
