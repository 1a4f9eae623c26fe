"""A diffusion transformer with two times, as a diffusers model; a published model takes this file along.

Tokens are patches of the latents. Each block is modulated by c = e(s) + g(s - t) + y, the embeddings of the
source time, of the gap and of the class (adaLN-zero: every block starts as the identity). The gap embedding g
has no biases and its features vanish at zero, so that
- g(0) = 0 always: on the diagonal the network is exactly a one-time velocity network, whatever was trained;
- with g's last layer at zero, as at birth, the network ignores t: a student that copies a teacher trained
by flow matching equals it to the last bit.
With `guidance_input` an embedding of 1 - 1 / scale, the scale of guidance, is of the same kind: it adds
nothing at scale 1, and at birth nothing at all.
Captions come in twice: each block lets its tokens attend to those of the caption, and the mean of these is
added to c. Both ways end in layers that are zero at birth. A learned token stands beside every caption, so
that an empty one is a caption, too.
The stages `embed`, `caption`, `blocks[i]` and `head` are called one by one and never reached into, so they
can be sharded, recomputed and differentiated in forward mode separately.

Source: Peebles and Xie, "Scalable diffusion models with transformers", 2023, section 3; QK norm: Dehghani
et al., "Scaling vision transformers to 22 billion parameters", 2023; captions: Chen et al., "PixArt-alpha",
2024, section 2.3.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..layers import Conditioned, CrossAttention, SelfAttention, Stage, normalised, waves


def position_embedding(side: int, width: int) -> Tensor:
    """Return sines and cosines of the row and the column of a side x side grid, (side * side, width)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, width // 2)
    columns = waves[None].expand(side, side, width // 2)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width).float()


class TimeEmbedding(nn.Module):
    """Two layers on waves of a time in [0, 1]; `vanishing` makes the embedding of 0 exactly 0."""

    def __init__(self, width: int, *, vanishing: bool, num_frequencies: int = 64) -> None:
        super().__init__()
        self.vanishing = vanishing
        self.num_frequencies = num_frequencies
        self.first = nn.Linear(2 * num_frequencies, width, bias=not vanishing)
        self.second = nn.Linear(width, width, bias=not vanishing)

    def forward(self, time: Tensor) -> Tensor:
        """Return the embedding (B, width) of times (B,): waves of 1 to 100 radians, fp32 or better."""
        with torch.autocast(time.device.type, enabled=False):
            weight = self.first.weight
            given = waves(time, self.num_frequencies, vanishing=self.vanishing).to(weight.dtype)
            hidden = F.silu(self.first(given))
            return self.second(hidden)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return layer-normalised tokens (B, L, width), scaled and shifted by (B, width)."""
    return normalised(tokens) * (1 + scale[:, None]) + shift[:, None]


class Embed(Stage):
    """From a state, its two times, its class and its guidance to tokens and the modulation's input."""

    def __init__(
        self,
        side: int,
        patch_size: int,
        in_channels: int,
        width: int,
        num_classes: int,
        *,
        guided: bool = False,
    ) -> None:
        super().__init__()
        self.side = side
        self.patch_size = patch_size
        self.register_buffer("positions", position_embedding(side, width))
        self.patches = nn.Linear(in_channels * patch_size**2, width)
        self.source = TimeEmbedding(width, vanishing=False)
        self.gap = TimeEmbedding(width, vanishing=True)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.guidance = TimeEmbedding(width, vanishing=True) if guided else None
        self.num_inputs = 4 + guided

    def compute(
        self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L, width) of x (B, C, H, W) and the modulation's input c (B, width)."""
        size, side = self.patch_size, self.side
        patches = x.reshape(len(x), x.shape[1], side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        tokens = self.patches(patches.reshape(len(x), side * side, self.patches.in_features)) + self.positions
        c = self.source(s) + self.gap(s - t)
        if self.labels is not None:
            if condition is None:
                condition = torch.full((len(x),), self.labels.num_embeddings - 1, device=x.device)
            c = c + self.labels(condition)
        if self.guidance is not None and scale is not None:
            c = c + self.guidance(1 - 1 / scale)
        return tokens, c


class Caption(Stage):
    """From a caption to the tokens that blocks attend to and what it adds to the modulation's input."""

    num_inputs = 2

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width, elementwise_affine=False)
        self.projection = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.beside = nn.Parameter(torch.randn(width))
        self.mean = nn.Linear(width, width)

    def compute(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, L + 1, width) of a caption (B, L, text_width), their mask, and a part of c."""
        tokens = self.projection(self.norm(text))
        beside = self.beside.to(tokens.dtype).expand(len(tokens), 1, -1)
        tokens, mask = torch.cat([beside, tokens], dim=1), F.pad(mask, (1, 0), value=True)
        shares = mask / mask.sum(1, keepdim=True)
        return tokens, mask, self.mean((shares[:, None].to(tokens.dtype) @ tokens).squeeze(1))


class Block(Stage):
    """Attention and a perceptron, each normalised, modulated by c and gated (adaLN-zero).

    With `text` the tokens attend to those of a caption, too, in between.
    """

    def __init__(self, width: int, num_heads: int, *, mlp_ratio: float, qk_norm: bool, text: bool) -> None:
        super().__init__()
        self.num_inputs = 4 if text else 2
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        self.reading = CrossAttention(width, num_heads, qk_norm=qk_norm) if text else None

    def compute(self, tokens: Tensor, c: Tensor, *caption: Tensor) -> Tensor:
        """Return the next tokens (B, L, width) given c (B, width) and maybe a caption's tokens and mask."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, dim=1)
        tokens = tokens + gate_a[:, None] * self.attention(modulate(tokens, shift_a, scale_a))
        if self.reading is not None:
            tokens = tokens + self.reading(normalised(tokens), *caption)
        return tokens + gate_m[:, None] * self.mlp(modulate(tokens, shift_m, scale_m))


class Head(Stage):
    """The last normalisation and the projection of tokens to patches."""

    num_inputs = 2

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, outputs)

    def compute(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return patches (B, L, outputs)."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        return self.projection(modulate(tokens, shift, scale))


class DiT(Conditioned, ModelMixin, ConfigMixin):
    """The transformer `(x, s, t, condition) -> mean velocity like x`.

    Forward: x (B, in_channels, sample_size, sample_size), s and t (B,) in [0, 1], and
    - with `num_classes` labels (B,) in [0, num_classes], where the label `num_classes` means "no class";
    - with `text_width` captions (tokens (B, L, text_width), mask (B, L)), L at most `max_tokens`.
    A missing condition says nothing. With `out_channels` the result has other channels than x, with
    `guidance_input` the scale of guidance (B,) comes after the condition.
    """

    attention_layers = ("qkv", "query", "key_value", "attention.projection", "reading.projection")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 4,
        patch_size: int = 2,
        width: int = 192,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        qk_norm: bool = False,
        text_width: int = 0,
        max_tokens: int = 32,
        out_channels: int | None = None,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is no multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of num_heads {num_heads}")
        if num_classes and text_width:
            raise ValueError(
                f"num_classes {num_classes} and text_width {text_width}: a sample has a class or a caption; "
                "set one of them to 0"
            )
        self.num_inputs = (5 if text_width else 4) + guidance_input
        self.guidance_input = guidance_input
        self.side = sample_size // patch_size
        self.patch_size = patch_size
        self.text_width, self.max_tokens = text_width, max_tokens
        self.sample_shape = (in_channels, sample_size, sample_size)
        self.out_channels = out_channels or in_channels
        self.null_label = num_classes or None
        self.embed = Embed(self.side, patch_size, in_channels, width, num_classes, guided=guidance_input)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm, text=text_width > 0)
            for _ in range(depth)
        )
        self.caption = Caption(text_width, width) if text_width else None
        self.head = Head(width, self.out_channels * patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.embed.labels is not None:
            nn.init.normal_(
                self.embed.labels.weight, std=0.5
            )  # with the 0.02 of the paper classes are learned more slowly
        starts_at_zero: list[nn.Linear] = [self.embed.gap.second, self.head.modulation, self.head.projection]
        starts_at_zero += [block.modulation for block in self._blocks()]
        if self.embed.guidance is not None:
            starts_at_zero += [self.embed.guidance.second]
        if self.caption is not None:
            starts_at_zero += [self.caption.mean]
            starts_at_zero += [block.reading.projection for block in self._blocks() if block.reading]
        for linear in starts_at_zero:
            nn.init.zeros_(linear.weight)

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the network's."""
        return self.head.projection

    @property
    def new_layers(self) -> list[nn.Module]:
        """The layers of which a velocity network has learned nothing: those of the gap and of guidance."""
        return [layer for layer in (self.embed.gap, self.embed.guidance) if layer is not None]

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def unpatch(self, patches: Tensor) -> Tensor:
        """Return the picture (B, C, H, W) of patches (B, L, C * patch_size ** 2)."""
        side, size, channels = self.side, self.patch_size, self.out_channels
        grid = patches.reshape(len(patches), side, side, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(patches), channels, side * size, side * size)

    def compute(self, x: Tensor, s: Tensor, t: Tensor, *condition: Tensor | None) -> Tensor:
        """Return the mean velocity between the times s and t at the state x."""
        if self.caption is None:
            caption, (tokens, c) = (), self.embed(x, s, t, *condition)
        else:
            *caption, pooled = self.caption(*condition[:2])
            tokens, c = self.embed(x, s, t, None, *condition[2:])
            c = c + pooled
        for block in self.blocks:
            tokens = block(tokens, c, *caption)
        return self.unpatch(self.head(tokens, c))
