"""Captions to embeddings, by any text encoder of the transformers library.

Encoders of sentences (BERT and its kin), of CLIP, of T5, and language models all give one vector a token, the
last hidden state. It is read from a local folder or from the local Hugging Face cache, never from the
network, and from safetensors files alone: weights in pickles could run code.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import Pretrained, is_pretrained
from .prompt_encoder import PromptEncoder, prompt_encoder_of

DEFAULT_TOKENS = 77  # CLIP's length


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder: captions of up to `max_tokens` tokens, longer ones are cut."""

    model: nn.Module
    tokenizer: Any
    name: str
    max_tokens: int
    width: int

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Return the last hidden state of each caption's own tokens, float32 (num_tokens, width)."""
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        if mask.shape[1] == 0:  # a tokenizer without marks of start and end, and empty captions alone
            return [torch.zeros(0, self.width) for _ in captions]
        device = next(self.model.parameters()).device
        states = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=mask.to(device))
        return [
            state[:length]
            for state, length in zip(states[0].float().cpu(), mask.sum(1).tolist(), strict=True)
        ]

    @property
    def vocabulary(self) -> dict[str, int]:
        """The number of every token: the same weights mean something else under another one."""
        return self.tokenizer.get_vocab()


def load_text_encoder(place: str, *, max_tokens: int | None = None) -> TextEncoder | PromptEncoder:
    """Load a text encoder from a folder, a diffusers pipeline folder, or the cache by its id (`owner/name`).

    `max_tokens` is at most what the encoder takes, by default 77 or that if it is less. A pipeline's encoders
    read prompts as the pipeline does, see prompt_encoder.py.

    Raises `ValueError` where there is no encoder, no tokenizer, or no weights in safetensors.
    """
    if is_pretrained(place):
        return _of_pipeline(place, max_tokens)
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, logging
    except ImportError as error:
        raise ValueError("text encoders need transformers: pip install 'driftmap[text]'") from error
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    logging.disable_progress_bar()  # one for each process, of a second
    is_pipeline = (Path(place) / "text_encoder").is_dir()
    weights = str(Path(place) / "text_encoder") if is_pipeline else place
    words = str(Path(place) / "tokenizer") if is_pipeline else place
    try:
        config = AutoConfig.from_pretrained(weights, local_files_only=True)
        # Of an encoder with a decoder (T5) this class loads the encoder alone.
        kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        model, told = kind.from_pretrained(
            weights, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{place} is no text encoder that can be loaded: {_first_line(error)}. Expected a folder with "
            "config.json, a tokenizer and weights in safetensors, or the id of one in the local Hugging Face "
            "cache (`hf download ID` brings it there)"
        ) from error
    _settle(model, told["missing_keys"], place)
    model = _text_part(model).float()
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**31))
    if max_tokens is not None and not 1 <= max_tokens <= most:
        raise ValueError(f"max_tokens is {max_tokens}; {place} takes 1 to {most} tokens")
    return TextEncoder(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=place,
        max_tokens=max_tokens or min(DEFAULT_TOKENS, most),
        width=model.config.hidden_size,
    )


def _of_pipeline(place: str, max_tokens: int | None) -> PromptEncoder:
    encoder = prompt_encoder_of(Pretrained.open(place))
    if encoder is None:
        raise ValueError(f"the pipeline {place} has no text_encoder; its network takes no captions")
    if max_tokens not in (None, encoder.max_tokens):
        raise ValueError(
            f"max_tokens is {max_tokens}; the pipeline {place} reads prompts with their padding, "
            f"{encoder.max_tokens} tokens in all"
        )
    return encoder


def _settle(model: nn.Module, missing: Collection[str], place: str) -> None:
    """Refuse weights that the files lack, which are random then, unless the last hidden state needs none."""
    if needed := [name for name in missing if "pooler" not in name]:
        raise ValueError(
            f"the weights of {place} lack {needed[0]} and {len(needed) - 1} more; copy them again"
        )
    for name in missing:
        nn.init.zeros_(model.get_parameter(name))


def _text_part(model: Any) -> Any:
    """Return the part of a model that reads text: of CLIP its text model, of others all or the encoder."""
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        return model.text_model
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
