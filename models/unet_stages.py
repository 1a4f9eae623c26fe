"""The stages of a U-Net, made of the modules of diffusers' own, and how these are called.

They are called as diffusers calls them, but for three things, which forward-mode differentiation needs: the
form of the norms, the attention, and times in double precision where they are given so.
"""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from .layers import Stage, attend, beside_timestep, normalised, timestep_waves

TIMESTEPS = 1000  # the timestep of s = 1


class Normalised(nn.Module):
    """A group or layer norm of diffusers, with its weights, in a form that has right derivatives.

    Torch's (2.13) group norm with weights has a derivative of another dtype under autocast, and none where an
    input is not contiguous; of its layer norm see `normalised`.
    """

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x: by groups of channels (B, C, ...), or by token (B, L, C)."""
        if self.groups is None:
            return normalised(x, eps=self.eps) * self.weight + self.bias
        shape = (-1, *[1] * (x.dim() - 2))
        y = F.group_norm(x.contiguous(), self.groups, eps=self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


def attention_of(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return what diffusers' Attention gives, in the form `module.how`: a processor as its own ones.

    Of pictures (B, C, H, W), with a norm and a residual connection, or of tokens (B, L, C), which may read
    others (B, M, width) that a mask (B, 1, M) shows.
    """
    tokens = hidden_states
    if hidden_states.dim() == 4:
        tokens = module.group_norm(hidden_states.flatten(2)).transpose(1, 2)
    others = tokens if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (
        projection(given).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for projection, given in ((module.to_q, tokens), (module.to_k, others), (module.to_v, others))
    )
    seen = None if attention_mask is None else attention_mask[:, 0]
    mixed = attend(query, key, value, how=module.how, mask=seen)
    found = module.to_out[0](mixed.transpose(1, 2).flatten(2))
    if hidden_states.dim() == 4:
        whole = found.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
        return whole / module.rescale_output_factor
    return found


class Embed(Stage):
    """From both times, the class and the scale of guidance to what every layer is modulated by."""

    num_inputs = 4

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.times, self.classes = net.time_embedding, net.class_embedding

    def compute(self, s: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the embedding (B, 4 block_out_channels[0]) of times (B,) and labels (B,)."""
        with torch.autocast(s.device.type, enabled=False):
            linear = self.times.linear_1
            source = timestep_waves(TIMESTEPS * s, linear.in_features)
            beside = beside_timestep(s - t, scale)
            found = self.times(source.to(linear.weight.dtype), beside.to(linear.weight.dtype))
        if self.classes is None:
            return found
        if labels is None:
            labels = torch.full((len(s),), self.classes.num_embeddings - 1, device=s.device)
        return found + self.classes(labels)


class Entry(Stage):
    """The first convolution."""

    num_inputs = 1

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.convolution = net.conv_in

    def compute(self, x: Tensor) -> Tensor:
        """Return features (B, C, H, W) of a state."""
        return self.convolution(x)


class Layer(Stage):
    """A residual block, modulated by the times and the class, and attention where the level has it."""

    num_inputs = 5

    def __init__(self, resnet: nn.Module, attention: nn.Module | None) -> None:
        super().__init__()
        self.resnet, self.attention = resnet, attention

    def compute(
        self, hidden: Tensor, skip: Tensor | None, emb: Tensor, text: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        """Return the next features (B, C, H, W); on the way up those of the way down come in as `skip`."""
        hidden = self.resnet(hidden if skip is None else torch.cat([hidden, skip], dim=1), emb)
        if isinstance(self.attention, Transformer2DModel):
            mask = None if seen is None else seen[:, None]
            return self.attention(hidden, text, encoder_attention_mask=mask, return_dict=False)[0]
        return hidden if self.attention is None else self.attention(hidden)


class Resample(Stage):
    """A change of size by two."""

    num_inputs = 1

    def __init__(self, resampler: nn.Module) -> None:
        super().__init__()
        self.resampler = resampler

    def compute(self, hidden: Tensor) -> Tensor:
        """Return features of half or of double the size."""
        return self.resampler(hidden)


class Exit(Stage):
    """The last norm and convolution."""

    num_inputs = 1

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.norm, self.convolution = net.conv_norm_out, net.conv_out

    def compute(self, hidden: Tensor) -> Tensor:
        """Return the output (B, out_channels, H, W)."""
        return self.convolution(F.silu(self.norm(hidden)))


def stages_of(block: Any) -> Iterator[Stage]:
    """Yield the stages of a block of diffusers' U-Net in the order of its calls."""
    for resnet, attention in zip_longest(block.resnets, getattr(block, "attentions", [])):
        yield Layer(resnet, attention)
    for kind in ("downsamplers", "upsamplers"):
        for resampler in getattr(block, kind, None) or []:
            yield Resample(resampler)
