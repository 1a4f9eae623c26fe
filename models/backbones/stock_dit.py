"""The transformer of a diffusers checkpoint, DiTTransformer2DModel, with one time or two; classes.

Every block embeds the time and the class by itself, as diffusers' does. With `two_times` an embedding of the
gap s - t is added to what each block and the head are modulated by: it vanishes at zero, so that the diagonal
is the one-time network, and its last layer is zero at birth, so that the whole equals the checkpoint's.
DiTTransformer2DModel has no such input; a published two-time network takes this file along.

Source: Peebles and Xie, "Scalable diffusion models with transformers", 2023.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..layers import GAP_WAVES, Conditioned, Stage, attend, normalised, timestep_waves, waves


class ModulationInput(Stage):
    """From the source time and the class to what modulates, (B, width)."""

    num_inputs = 2

    def __init__(self, emb: Any, timesteps: int, first_timestep: int) -> None:
        super().__init__()
        self.times, self.classes = emb.timestep_embedder, emb.class_embedder.embedding_table
        self.timesteps, self.first = timesteps, first_timestep

    def compute(self, s: Tensor, labels: Tensor) -> Tensor:
        """Return the embedding of times (B,) in [0, 1] and labels (B,)."""
        with torch.autocast(s.device.type, enabled=False):
            linear = self.times.linear_1
            told = self.first + self.timesteps * s
            known = timestep_waves(told, linear.in_features, frequency_shift=1)
            return self.times(known.to(linear.weight.dtype)) + self.classes(labels)


class Gap(Stage):
    """The embedding of the gap s - t, zero at birth and always at zero."""

    num_inputs = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * GAP_WAVES, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.second.weight)

    def compute(self, gap: Tensor) -> Tensor:
        """Return the embedding (B, width) of gaps (B,)."""
        with torch.autocast(gap.device.type, enabled=False):
            weight = self.first.weight
            return self.second(F.silu(self.first(waves(gap, GAP_WAVES, vanishing=True).to(weight.dtype))))


class StockBlock(Stage):
    """Attention and a perceptron, modulated by c (adaLN-zero), of diffusers' BasicTransformerBlock."""

    num_inputs = 2

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.modulation, self.attention, self.mlp = block.norm1.linear, block.attn1, block.ff
        self.first_eps, self.second_eps = block.norm1.norm.eps, block.norm3.eps
        setattr(self.attention, "how", "sdpa")  # noqa: B010 - as in trainer/blocks.py

    def compute(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the next tokens (B, L, width) given c (B, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in self.modulation(F.silu(c)).chunk(6, dim=1)
        )
        given = normalised(tokens, eps=self.first_eps) * (1 + scale_a) + shift_a
        tokens = tokens + gate_a * self._attended(given)
        return tokens + gate_m * self.mlp(normalised(tokens, eps=self.second_eps) * (1 + scale_m) + shift_m)

    def _attended(self, tokens: Tensor) -> Tensor:
        attention: Any = self.attention
        query, key, value = (
            projection(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for projection in (attention.to_q, attention.to_k, attention.to_v)
        )
        mixed = attend(query, key, value, how=attention.how)
        return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


class Patches(Stage):
    """From a state to its tokens."""

    num_inputs = 1

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.projection = net.pos_embed.proj
        self.register_buffer("positions", net.pos_embed.pos_embed.clone(), persistent=False)

    def compute(self, x: Tensor) -> Tensor:
        """Return tokens (B, L, width)."""
        tokens = self.projection(x).flatten(2).transpose(1, 2)
        return tokens + self.positions.to(tokens.dtype)


class StockHead(Stage):
    """The last normalisation and the projection of tokens to patches."""

    num_inputs = 2

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.modulation, self.projection, self.eps = net.proj_out_1, net.proj_out_2, net.norm_out.eps

    def compute(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return patches (B, L, outputs)."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        return self.projection(normalised(tokens, eps=self.eps) * (1 + scale[:, None]) + shift[:, None])


class StockDiT(Conditioned, ModelMixin, ConfigMixin):
    """The transformer `(x, s, t, labels) -> what the checkpoint's network says`; `settings` are diffusers'.

    Forward: x (B, in_channels, sample_size, sample_size), s and t (B,) in [0, 1], labels (B,) in
    [0, num_classes], where `num_classes` means "no class".
    """

    text_width, max_tokens, guidance_input, num_inputs = 0, 0, False, 4

    @register_to_config
    def __init__(
        self,
        *,
        settings: dict[str, Any],
        two_times: bool = False,
        num_classes: int = 1000,
        timesteps: int = 1000,
        first_timestep: int = 0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            name: v for name, v in settings.items() if not name.startswith("_")
        } | {"dropout": 0.0}
        net: Any = DiTTransformer2DModel(**self.settings)
        if num_classes != net.config["num_embeds_ada_norm"]:
            raise ValueError(f"num_classes {num_classes} is not num_embeds_ada_norm of the network's config")
        self.max_radians = timesteps
        self.two_times = two_times
        self.patch_size, side = net.config["patch_size"], net.config["sample_size"]
        self.side = side // self.patch_size
        self.in_channels, self.sample_size = net.config["in_channels"], side
        self.sample_shape = (self.in_channels, side, side)
        self.out_channels = net.out_channels
        self.null_label = num_classes
        self.num_timesteps, self.first_timestep = timesteps, first_timestep
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.patches, self.head = Patches(net), StockHead(net)
        embeddings = [block.norm1.emb for block in net.transformer_blocks]
        self.inputs = nn.ModuleList(ModulationInput(emb, timesteps, first_timestep) for emb in embeddings)
        self.blocks = nn.ModuleList(StockBlock(block) for block in net.transformer_blocks)
        self.stock_names = {name: names.pop(id(parameter)) for name, parameter in self.named_parameters()}
        assert not names, f"parts of no stage: {names.values()}"
        self.gap = Gap(net.inner_dim) if two_times else None

    @property
    def new_layers(self) -> list[nn.Module]:
        """The layers that are not the checkpoint's: what takes a second time."""
        return [] if self.gap is None else [self.gap]

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the network's."""
        return self.head.projection

    def stock(self) -> DiTTransformer2DModel:
        """Return diffusers' own model with these weights; it has one time."""
        if self.two_times:
            raise ValueError("DiTTransformer2DModel has one time, and this network two")
        net, own = DiTTransformer2DModel(**self.settings), self.state_dict()
        net.load_state_dict({theirs: own[name] for name, theirs in self.stock_names.items()}, strict=False)
        return net

    def compute(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the prediction for a jump from s to t at the state x."""
        if labels is None:
            labels = torch.full((len(x),), self.null_label, device=x.device)
        tokens = self.patches(x)
        gap = self.gap(s - t) if self.gap is not None else 0
        inputs = [given(s, labels) + gap for given in self.inputs]
        for block, c in zip(self.blocks, inputs, strict=True):
            tokens = block(tokens, c)
        return self.unpatch(self.head(tokens, inputs[0]))

    def unpatch(self, patches: Tensor) -> Tensor:
        """Return the picture (B, C, H, W) of patches (B, L, patch_size ** 2 * C)."""
        side, size, channels = self.side, self.patch_size, self.out_channels
        grid = patches.reshape(len(patches), side, side, size, size, channels).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(len(patches), channels, side * size, side * size)
