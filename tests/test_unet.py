"""The U-Net is diffusers' own: its weights load there, and give the same called as the pipeline does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, UNet2DConditionModel
from latents import write_latents
from torch import Tensor, nn
from torch.autograd import forward_ad

from driftmap.launch.export import check_export, export
from driftmap.models.backbones.unet import UNet
from driftmap.models.condition import Condition
from driftmap.models.flow_map import FlowMap
from driftmap.models.layers import Stage, innermost_stages
from driftmap.models.pipeline import FlowMapPipeline
from driftmap.models.unet_stages import Normalised
from driftmap.trainer.blocks import attentions, blocks, set_attention
from driftmap.trainer.build import train
from driftmap.trainer.compatibility import check_compatibility
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from
from runs import write_config

SMALL: dict[str, Any] = {"sample_size": 8, "in_channels": 2, "block_out_channels": (8, 16, 16)}
SMALL |= {"layers_per_block": 1, "attention_levels": (1, 2), "head_width": 8, "norm_num_groups": 4}
KINDS: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "classes": {"num_classes": 3},
    "captions": {"text_width": 5, "max_tokens": 4},
    "learned variance": {"num_classes": 3, "out_channels": 4},
    "two layers": {"layers_per_block": 2, "attention_levels": (0,)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
S, T = torch.tensor([1.0, 0.7, 0.4, 0.1]), torch.tensor([0.0, 0.7, 0.9, 0.05])


def unet(kind: str) -> UNet:
    """Return a network none of whose weights is at its start."""
    torch.manual_seed(0)
    found = UNet(**{**SMALL, **KINDS[kind]})
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return found


def given(found: UNet) -> Condition | None:
    return FlowMap(found).any_condition(4)


def state() -> Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("missing", [False, True])
@every_kind
@torch.no_grad()
def test_diffusers_own_network_called_by_the_pipeline_says_the_same(kind: str, missing: bool) -> None:
    found = unet(kind)
    pipe = FlowMapPipeline(FlowMapEulerDiscreteScheduler(), unet=found.stock())
    condition = None if missing else given(found)
    expected = found(state(), S, T, condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(pipe.velocity(state(), S, T, condition), expected, rtol=1e-5, atol=1e-5)
    other = pipe.velocity(state(), S, S, condition)  # it looks at the gap
    assert (other - expected)[1].abs().max() < 1e-5 < 1e-3 < (other - expected)[0].abs().max()


def test_an_exported_run_samples_the_same_without_driftmap(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents", side=8)
    model = {
        "name": "unet",
        **SMALL,
        "block_out_channels": [8, 16, 16],
        "attention_levels": [1],
        "num_classes": 2,
    }
    steps = {"training__steps": 3, "training__save_every": 3, "data__batch_size": 12}
    config = write_config(tmp_path / "config.yaml", tmp_path / "latents", model=model, **steps)
    train(recipe_from(read_config(config)), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "pipeline")
    assert check_export(folder, tmp_path / "run") <= 1e-5
    native = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert native.config.time_cond_proj_dim == 128 and native.config.num_class_embeds == 3  # pyright: ignore


@every_kind
def test_all_of_it_is_stages_that_can_be_called_one_by_one(kind: str) -> None:
    """FSDP2 shards what `blocks` finds, each a stage; ZeRO-3 wants every parameter inside one."""
    found = unet(kind)
    assert all(isinstance(block, Stage) for block in blocks(found))
    inside = [id(p) for stage in innermost_stages(found) for p in stage.parameters()]
    assert sorted(inside) == sorted(id(p) for p in found.parameters())
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks(found))
    assert largest < 0.4 * sum(p.numel() for p in found.parameters())


@every_kind
@torch.no_grad()
def test_every_attention_takes_the_form_that_is_chosen(kind: str) -> None:
    found, x = unet(kind), state()
    expected = found(x, S, T, given(found))
    native = [m for m in found.modules() if type(m).__name__ == "Attention"]
    assert attentions(found) == native and native
    set_attention(found, "math")
    torch.testing.assert_close(found(x, S, T, given(found)), expected, rtol=1e-4, atol=1e-5)
    set_attention(found, "xformers")
    if kind != "captions":
        with pytest.raises(ModuleNotFoundError, match="xformers"):
            found(x, S, T, given(found))


def tangent(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a norm and its derivative along a direction, under autocast to bf16."""
    with torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x.flip(0))))
        return value, slope


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.LayerNorm(6)])
def test_a_norm_is_torchs_own_with_a_derivative_in_half_precision_and_of_any_layout(norm: Any) -> None:
    nn.init.normal_(norm.weight)
    ours, x = Normalised(norm), torch.randn(3, 6, 4, 4).to(memory_format=torch.channels_last)
    x = x if isinstance(norm, nn.GroupNorm) else x.flatten(2).mT
    torch.testing.assert_close(ours(x), norm(x))
    for given in (x, x.bfloat16()):
        value, slope = tangent(ours, given)
        assert value.dtype == slope.dtype
    if isinstance(norm, nn.GroupNorm):  # torch's own (2.13) has neither
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            tangent(norm, x)
        value, slope = tangent(norm, x.contiguous().bfloat16())
        assert value.dtype != slope.dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_size": 6}, "sample_size 6 is no multiple of 4, by which the last of the 3 levels"),
        ({"attention_levels": (3,)}, "attention_levels has 3, but block_out_channels has the levels 0 to 2"),
        ({"head_width": 12}, "block_out_channels has 16, which is no multiple of head_width 12"),
        ({"norm_num_groups": 3}, "block_out_channels has 8, which is no multiple of norm_num_groups 3"),
        ({"num_classes": 2, "text_width": 3}, "a sample has a class or a caption; set one of them to 0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **settings})


def test_a_finite_difference_along_the_timestep_is_refused(tmp_path: Path) -> None:
    objective = {"name": "eulerian", "derivative": "finite_difference"}
    config = write_config(tmp_path / "c.yaml", tmp_path, model={"name": "unet"}, objective=objective)
    recipe = recipe_from(read_config(config))
    with pytest.raises(ConfigError, match="this network sees waves of 1000 radians .*; use forward"):
        check_compatibility(recipe, FlowMap(unet("classes")))
    forward = replace(recipe.objective, derivative="forward")
    check_compatibility(replace(recipe, objective=forward), FlowMap(unet("classes")))


def test_samples_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 4, 16\), expected \(4, 2, 8, 8\)"):
        unet("classes")(torch.zeros(4, 2, 4, 16), S, T)
