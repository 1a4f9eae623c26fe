"""A two-time U-Net made of diffusers' own UNet2DConditionModel, whose weights stock diffusers loads.

The modules are diffusers' and `stock()` gives them back as its model; ours is how they are called. The source
time s goes in as the timestep 1000 s, as everywhere in diffusers. The gap s - t goes in as `timestep_cond`:
waves that vanish at zero, which the model's `cond_proj`, without a bias, adds to those of the timestep. So
- on the diagonal the network is exactly the one-time network, whatever was trained;
- with `cond_proj` at zero, as at birth, the network ignores t: a student that copies a one-time network
equals it to the last bit, and so will one made of a published checkpoint.
With `guidance_input` the waves of 1 - 1 / scale stand beside those of the gap, in the same `cond_proj`: at
scale 1 the network is the one without guidance, and at birth at any scale.
A derivative along t (Lagrangian rule) sees the waves of the gap only, up to 100 radians a unit of time as in
the DiT; one along s (Eulerian rule) sees those of the timestep, too, up to 1000: it is larger, and a finite
difference along s needs a step ten times as short.
Classes are embedded and added to the times. Captions are attended to, beside a token of zeros, so that an
empty one is a caption, too. The stages `embed`, `entry`, `down[i]`, `middle[i]`, `up[i]`, `exit` are called
by turns and never reached into, so they can be sharded, recomputed and differentiated in forward mode
separately; they are single layers, where diffusers' blocks are whole levels.

Source: Ronneberger et al., "U-Net", 2015; Ho, Jain and Abbeel, "Denoising diffusion probabilistic models",
2020, appendix B; captions: Rombach et al., "High-resolution image synthesis with latent diffusion models",
2022, section 3.3. Latent consistency models (Luo et al., 2023) give the guidance scale as `timestep_cond`.
"""

from collections.abc import Iterable
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..layers import GAP_WAVES, beside_zeros
from ..staged_unet import StagedUNet
from ..unet_stages import TIMESTEPS, Embed, Layer


class UNet(StagedUNet):
    """The U-Net `(x, s, t, condition) -> mean velocity like x`; each level is half as large as the last.

    Forward: x (B, in_channels, sample_size, sample_size), s and t (B,) in [0, 1], and
    - with `num_classes` labels (B,) in [0, num_classes], where the label `num_classes` means "no class";
    - with `text_width` captions (tokens (B, L, text_width), mask (B, L)), L at most `max_tokens`.
    A missing condition says nothing. `attention_levels` counts from 0, the largest; with captions the middle
    attends, too. With `out_channels` the result has other channels than x. With `guidance_input` it takes the
    scale of guidance (B,) after the condition.
    """

    max_radians = TIMESTEPS  # of the fastest wave, a unit of s

    def __init__(
        self,
        *,
        sample_size: int = 8,
        in_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        head_width: int = 32,
        norm_num_groups: int = 32,
        num_classes: int = 0,
        text_width: int = 0,
        max_tokens: int = 32,
        out_channels: int | None = None,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if num_classes and text_width:
            raise ValueError(
                f"num_classes {num_classes} and text_width {text_width}: a sample has a class or a caption; "
                "set one of them to 0"
            )
        widths = tuple(block_out_channels)
        _check_levels(widths, sample_size, attention_levels)
        attending = {widths[level] for level in attention_levels} | ({widths[-1]} if text_width else set())
        _check_widths(widths, "norm_num_groups", norm_num_groups)
        _check_widths(sorted(attending), "head_width", head_width)
        self.num_inputs = (5 if text_width else 4) + guidance_input
        self.guidance_input = guidance_input
        self.text_width, self.max_tokens = text_width, max_tokens
        self.sample_shape = (in_channels, sample_size, sample_size)
        self.out_channels = out_channels or in_channels
        self.null_label = num_classes or None
        kind = "CrossAttn" if text_width else "Attn"
        kinds = [kind if level in attention_levels else "" for level in range(len(widths))]
        # Diffusers (0.42) takes the number of heads under this name; in blocks without captions, their width.
        heads = tuple(width // head_width if text_width else head_width for width in widths)
        self.settings: dict[str, Any] = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": self.out_channels,
            "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
            "mid_block_type": "UNetMidBlock2DCrossAttn" if text_width else "UNetMidBlock2D",
            "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "cross_attention_dim": text_width or 1,
            "attention_head_dim": heads,
            "use_linear_projection": True,
            "num_class_embeds": num_classes + 1 if num_classes else None,
            "resnet_time_scale_shift": "scale_shift",
            "time_cond_proj_dim": 2 * GAP_WAVES * (1 + guidance_input),
        }
        net = UNet2DConditionModel(**self.settings)
        self.take_apart(net, Embed(net))
        self._initialise()

    @property
    def new_layers(self) -> list[nn.Module]:
        """The layer of which a velocity network has learned nothing: that of the gap and of guidance."""
        return [self.embed.times.cond_proj]

    def _initialise(self) -> None:
        """Let every layer start as the identity, the output at zero, and the network blind to the gap."""
        starts_at_zero: list[Any] = [self.embed.times.cond_proj, self.exit.convolution]
        for layer in self.modules():
            if isinstance(layer, Layer):
                found: Any = layer
                starts_at_zero.append(found.resnet.conv2)
                if isinstance(layer.attention, Attention):
                    starts_at_zero.append(found.attention.to_out[0])
                elif layer.attention is not None:
                    starts_at_zero.append(found.attention.proj_out)
        for linear in starts_at_zero:
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def compute(self, x: Tensor, s: Tensor, t: Tensor, *condition: Any) -> Tensor:
        """Return the mean velocity between the times s and t at the state x."""
        *given, scale = condition if self.guidance_input else (*condition, None)
        labels, text, seen = (None, *beside_zeros(*given)) if self.text_width else (*given, None, None)
        return self.through(x, self.embed(s, t, labels, scale), text, seen)


def _check_levels(widths: tuple[int, ...], sample_size: int, attention_levels: tuple[int, ...]) -> None:
    smaller = 2 ** (len(widths) - 1)
    if sample_size % smaller:
        raise ValueError(
            f"sample_size {sample_size} is no multiple of {smaller}, by which the last of the {len(widths)} "
            "levels of block_out_channels is smaller"
        )
    missing = [level for level in attention_levels if not 0 <= level < len(widths)]
    if missing:
        raise ValueError(
            f"attention_levels has {missing[0]}, but block_out_channels has the levels 0 to {len(widths) - 1}"
        )


def _check_widths(widths: Iterable[int], name: str, divisor: int) -> None:
    for width in widths:
        if width % divisor:
            raise ValueError(f"block_out_channels has {width}, which is no multiple of {name} {divisor}")
