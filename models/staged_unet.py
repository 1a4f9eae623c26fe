"""A U-Net of diffusers as stages: its own modules, called by turns.

The way down keeps what every layer gives, and the way up takes it again. A network says how its times and
its condition are embedded; the rest is the same for UNet2DModel and UNet2DConditionModel.
"""

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .layers import Conditioned, Stage
from .unet_stages import Entry, Exit, Normalised, Resample, attention_of, stages_of


class StagedUNet(Conditioned):
    """A network of the stages `embed`, `entry`, `down[i]`, `middle[i]`, `up[i]`, `exit`.

    `settings` are those of diffusers' class, `stock_names` what it calls each weight.
    """

    settings: dict[str, Any]
    stock_class: type = UNet2DConditionModel
    embed: Any

    def take_apart(self, net: UNet2DModel | UNet2DConditionModel, embed: Stage) -> None:
        """Make stages of the modules of diffusers' network, and note what it calls their weights."""
        for module in list(net.modules()):
            for name, norm in module.named_children():
                if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                    setattr(module, name, Normalised(norm))
            if isinstance(module, Attention):
                setattr(module, "how", "sdpa")  # noqa: B010 - as in trainer/blocks.py
                as_theirs: Any = attention_of
                module.set_processor(as_theirs)
        theirs = {id(parameter): name for name, parameter in net.named_parameters()}
        self.embed, self.entry, self.exit = embed, Entry(net), Exit(net)
        self.down = nn.ModuleList(stage for block in net.down_blocks for stage in stages_of(block))
        self.middle = nn.ModuleList(stages_of(net.mid_block))
        self.up = nn.ModuleList(stage for block in net.up_blocks for stage in stages_of(block))
        self.stock_names = {name: theirs.pop(id(parameter)) for name, parameter in self.named_parameters()}
        assert not theirs, f"parts of no stage: {theirs.values()}"

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the network's."""
        return self.exit.convolution

    def stock(self) -> UNet2DModel | UNet2DConditionModel:
        """Return diffusers' own model with these weights; see models/pipeline.py for how it is called."""
        net = self.stock_class(**self.settings)
        own = self.state_dict()
        net.load_state_dict({theirs: own[name] for name, theirs in self.stock_names.items()})
        return net

    def through(self, x: Tensor, emb: Tensor, text: Tensor | None, seen: Tensor | None) -> Tensor:
        """Return the output (B, C, H, W) at the state x, modulated by `emb`; `text` is attended to."""
        hidden = self.entry(x)
        skips = [hidden]
        for stage in self.down:
            hidden = stage(hidden) if isinstance(stage, Resample) else stage(hidden, None, emb, text, seen)
            skips.append(hidden)
        for stage in self.middle:
            hidden = stage(hidden, None, emb, text, seen)
        for stage in self.up:
            if isinstance(stage, Resample):
                hidden = stage(hidden)
            else:
                hidden = stage(hidden, skips.pop(), emb, text, seen)
        return self.exit(hidden)
