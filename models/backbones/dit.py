"""A diffusion transformer with two times, as a diffusers model; a published model takes this file along.

Tokens are patches of the latents. Each block is modulated by c = e(s) + g(s - t) + y, the embeddings of the
source time, of the gap and of the class (adaLN-zero: every block starts as the identity). The gap embedding g
has no biases and its features vanish at zero, so that
- g(0) = 0 always: on the diagonal the network is exactly a one-time velocity network, whatever was trained;
- with g's last layer at zero, as at birth, the network ignores t: a student that copies a teacher trained
by flow matching equals it to the last bit.
The stages `embed`, `blocks[i]` and `head` are called one by one and never reached into, so they can be
sharded, recomputed and differentiated in forward mode separately.

Source: Peebles and Xie, "Scalable diffusion models with transformers", 2023, section 3; QK norm: Dehghani
et al., "Scaling vision transformers to 22 billion parameters", 2023.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..layers import Attention, Stage, attend


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
        precise = time.to(torch.promote_types(time.dtype, torch.float32))
        exponents = torch.linspace(0.0, 2.0, self.num_frequencies, dtype=precise.dtype, device=time.device)
        angles = precise[:, None] * 10.0**exponents
        level = 1 - angles.cos() if self.vanishing else angles.cos()
        waves = torch.cat([angles.sin(), level], dim=1)
        with torch.autocast(time.device.type, enabled=False):
            weight = self.first.weight
            hidden = F.silu(self.first(waves.to(weight.dtype)))
            return self.second(hidden)


class SelfAttention(nn.Module):
    """Self-attention over tokens (B, L, width); `qk_norm` normalises queries and keys a head."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.how: Attention = "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        head = width // num_heads
        self.query_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the attended tokens (B, L, width)."""
        batch, length, width = tokens.shape
        heads = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(self.query_norm(query), self.key_norm(key), value, how=self.how)
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return layer-normalised tokens (B, L, width), scaled and shifted by (B, width)."""
    # One group a token is layer norm. F.layer_norm itself has a wrong gradient of its forward-mode derivative
    # (torch 2.13; see pytorch issue 196700), which is what the Lagrangian residual trains on.
    normalised = F.group_norm(tokens.flatten(0, 1), 1, eps=1e-6).view_as(tokens)
    return normalised * (1 + scale[:, None]) + shift[:, None]


class Embed(Stage):
    """From a state, its two times and its class to tokens and the modulation's input."""

    num_inputs = 4

    def __init__(self, side: int, patch_size: int, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.side = side
        self.patch_size = patch_size
        self.register_buffer("positions", position_embedding(side, width))
        self.patches = nn.Linear(in_channels * patch_size**2, width)
        self.source = TimeEmbedding(width, vanishing=False)
        self.gap = TimeEmbedding(width, vanishing=True)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None

    def compute(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L, width) of x (B, C, H, W) and the modulation's input c (B, width)."""
        size, side = self.patch_size, self.side
        patches = x.reshape(len(x), x.shape[1], side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        tokens = self.patches(patches.reshape(len(x), side * side, self.patches.in_features)) + self.positions
        c = self.source(s) + self.gap(s - t)
        if self.labels is not None:
            if condition is None:
                condition = torch.full((len(x),), self.labels.num_embeddings - 1, device=x.device)
            c = c + self.labels(condition)
        return tokens, c


class Block(Stage):
    """Attention and a perceptron, each normalised, modulated by c and gated (adaLN-zero)."""

    num_inputs = 2

    def __init__(self, width: int, num_heads: int, *, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def compute(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the next tokens (B, L, width) given the modulation's input c (B, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, dim=1)
        tokens = tokens + gate_a[:, None] * self.attention(modulate(tokens, shift_a, scale_a))
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


class DiT(Stage, ModelMixin, ConfigMixin):
    """The transformer `(x, s, t, condition) -> mean velocity like x`.

    Forward: x (B, in_channels, sample_size, sample_size), s and t (B,) in [0, 1], labels (B,) in
    [0, num_classes], where the label `num_classes` means "no class" and is what a missing condition becomes.
    """

    num_inputs = 4

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
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is no multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of num_heads {num_heads}")
        self.side = sample_size // patch_size
        self.patch_size = patch_size
        self.sample_shape = (in_channels, sample_size, sample_size)
        self.null_label = num_classes or None
        self.embed = Embed(self.side, patch_size, in_channels, width, num_classes)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm) for _ in range(depth)
        )
        self.head = Head(width, in_channels * patch_size**2)
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
        for linear in starts_at_zero + [block.modulation for block in self._blocks()]:
            nn.init.zeros_(linear.weight)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def unpatch(self, patches: Tensor) -> Tensor:
        """Return the picture (B, C, H, W) of patches (B, L, C * patch_size ** 2)."""
        side, size, channels = self.side, self.patch_size, self.sample_shape[0]
        grid = patches.reshape(len(patches), side, side, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(patches), *self.sample_shape)

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean velocity between the times s and t at the state x."""
        return super().__call__(x, s, t, condition)

    def compute(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """Return the mean velocity between the times s and t at the state x."""
        if tuple(x.shape[1:]) != self.sample_shape:
            expected = (len(x), *self.sample_shape)
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {expected}")
        tokens, c = self.embed(x, s, t, condition)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatch(self.head(tokens, c))
