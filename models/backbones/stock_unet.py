"""The U-Net of a diffusers checkpoint: any UNet2DModel, or UNet2DConditionModel that reads prompts.

It has one time, or with `two_times` two, and is called in our times: s = 1 is the last step of the chain,
whose timestep is `timesteps + first_timestep`. What a second time takes is new, and is zero at birth, so that
the network equals the checkpoint's to the last bit:
- in UNet2DConditionModel waves of the gap s - t go in as `timestep_cond`, as in the network `unet`;
- UNet2DModel has no such input, and takes 100 (s - t) as a class of `class_embed_type: timestep`.
Stock diffusers loads either.

A prompt is (tokens (B, max_tokens, text_width), mask), padding and all, as the checkpoint's pipeline embeds
it. Where the mask is False everywhere there stands `nothing`, the prompt that says nothing: an embedding that
was made of the empty one, or of a negative one. The prompt of an XL network has one token more, in front: its
pooled embedding and six numbers of its picture, the rest zeros (see trainer/prompts.py).

Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022; the added
conditions: Podell et al., "SDXL", 2023, section 2.2.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ..layers import GAP_RADIANS, GAP_WAVES, Stage, beside_timestep, timestep_waves
from ..staged_unet import StagedUNet

CLASSES = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
SIZES = 6  # numbers of a picture that an XL network is told
BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
BLOCKS += ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
# What changes how a network is called, with the values that leave it as it is called here.
PLAIN: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (None, False),
    "time_embedding_type": ("positional",),
    "downsample_type": (None, "conv"),
    "upsample_type": (None, "conv"),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
    "timestep_post_act": (None,),
    "time_embedding_act_fn": (None,),
    "class_embeddings_concat": (None, False),
    "attention_type": (None, "default"),
    "num_attention_heads": (None,),
}


def refuse_unusual(config: dict[str, Any]) -> None:
    """Raise ValueError where a network of diffusers is called otherwise than here."""
    for name, plain in PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise ValueError(
                f"its config.json says {name} {config[name]!r}; networks with {name} other than "
                f"{' or '.join(map(repr, plain))} cannot be trained from a checkpoint"
            )
    kinds = [*config["down_block_types"], config.get("mid_block_type"), *config["up_block_types"]]
    for kind in kinds:
        if kind is not None and kind not in BLOCKS:
            raise ValueError(f"its config.json has blocks {kind!r}; those that can be trained are {BLOCKS}")


class StockUNet(StagedUNet):
    """The U-Net `(x, s, t, condition) -> what the checkpoint's network predicts`, of diffusers' `settings`.

    Forward: x (B, in_channels, sample_size, sample_size), s and t (B,) in [0, 1]; with `text_width` prompts
    (tokens (B, L, text_width), mask (B, L)), and with `guidance_input` after them scales of guidance (B,).
    """

    def __init__(
        self,
        *,
        settings: dict[str, Any],
        two_times: bool = False,
        guidance_input: bool = False,
        text_width: int = 0,
        max_tokens: int = 0,
        timesteps: int = 1000,
        first_timestep: int = 0,
    ) -> None:
        super().__init__()
        refuse_unusual(settings)
        kind = settings.get("_class_name", "UNet2DConditionModel")
        self.stock_class = CLASSES[kind]
        self.reads = kind == "UNet2DConditionModel"
        if text_width != (settings["cross_attention_dim"] if self.reads else 0):
            raise ValueError(
                f"text_width {text_width} is not the cross_attention_dim of the network's config"
            )
        if guidance_input and not (two_times and self.reads):
            raise ValueError("guidance_input needs a network with timestep_cond, which UNet2DModel has not")
        self.max_radians = timesteps
        self.two_times, self.guidance_input = two_times, guidance_input
        self.text_width, self.max_tokens = text_width, max_tokens
        self.num_inputs = (5 if text_width else 4) + guidance_input
        size = settings["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (settings["in_channels"], height, width)
        self.out_channels = settings["out_channels"]
        self.null_label = None
        # Dropout's numbers would come from a generator with a state.
        self.settings = {name: v for name, v in settings.items() if not name.startswith("_")} | {
            "dropout": 0.0
        }
        if two_times and self.reads:
            self.settings["time_cond_proj_dim"] = 2 * GAP_WAVES * (1 + guidance_input)
        elif two_times:
            self.settings["class_embed_type"] = "timestep"
        net: Any = self.stock_class(**self.settings)
        self.take_apart(net, StockEmbed(net, timesteps, first_timestep))
        if text_width:
            self.register_buffer("nothing", torch.zeros(max_tokens, text_width))
        embed: Any = self.embed
        if two_times:
            last = embed.times.cond_proj if self.reads else embed.gaps.linear_2
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def num_pooled(self) -> int:
        """The width of the pooled embedding in the token in front of prompts; 0 where there is none."""
        embed: Any = self.embed
        return embed.num_pooled

    @property
    def new_layers(self) -> list[nn.Module]:
        """The layers that are not the checkpoint's: what takes a second time."""
        embed: Any = self.embed
        return [embed.times.cond_proj if self.reads else embed.gaps] if self.two_times else []

    def compute(self, x: Tensor, s: Tensor, t: Tensor, *condition: Any) -> Tensor:
        """Return the prediction for a jump from s to t at the state x."""
        *given, scale = condition if self.guidance_input else (*condition, None)
        text, beside = None, None
        if self.text_width:
            text = self._spoken(*given)
            if self.embed.added is not None:
                beside, text = text[:, 0], text[:, 1:]
        return self.through(x, self.embed(s, t, beside, scale), text, None)

    def _spoken(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return prompts (B, L, width), `nothing` where there is none."""
        known: Any = self.nothing
        nothing = known.to(tokens.dtype).expand(len(tokens), -1, -1)
        if tokens.shape[1] == 0:
            return nothing
        silent = ~mask.any(1)
        if tokens.shape[1] < self.max_tokens:
            raise ValueError(
                f"prompts have {tokens.shape[1]} tokens, and this network reads them with their padding, "
                f"{self.max_tokens} in all; encode them with the checkpoint as --text-encoder"
            )
        return torch.where(silent[:, None, None], nothing, tokens)


class StockEmbed(Stage):
    """From both times, what stands beside a prompt, and the scale of guidance to the embedding of all."""

    num_inputs = 4

    def __init__(self, net: Any, timesteps: int, first_timestep: int) -> None:
        super().__init__()
        self.times, self.gaps = net.time_embedding, getattr(net, "class_embedding", None)
        self.added = getattr(net, "add_embedding", None)
        self.timesteps, self.first = timesteps, first_timestep
        self.form = {
            "cosines_first": net.config["flip_sin_to_cos"],
            "frequency_shift": net.config["freq_shift"],
        }
        self.size_width = net.config.get("addition_time_embed_dim") or 0
        self.num_pooled = 0
        if self.added is not None:
            self.num_pooled = self.added.linear_1.in_features - SIZES * self.size_width

    def compute(self, s: Tensor, t: Tensor, beside: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the embedding (B, width) of times (B,); `beside` (B, text_width) is a first token."""
        with torch.autocast(s.device.type, enabled=False):
            weight = self.times.linear_1.weight
            width, dtype = self.times.linear_1.in_features, weight.dtype
            source = timestep_waves(self.first + self.timesteps * s, width, **self.form).to(dtype)
            if self.times.cond_proj is not None:
                found = self.times(source, beside_timestep(s - t, scale).to(dtype))
            else:
                found = self.times(source)
            if self.gaps is not None:
                found = found + self.gaps(timestep_waves(GAP_RADIANS * (s - t), width, **self.form).to(dtype))
            if self.added is not None and beside is not None:
                pooled = self.num_pooled
                numbers = beside[:, pooled : pooled + SIZES]
                sizes = timestep_waves(numbers.flatten(), self.size_width, **self.form)
                told = torch.cat([beside[:, :pooled], sizes.reshape(len(s), SIZES * self.size_width)], dim=1)
                found = found + self.added(told.to(dtype))
        return found
