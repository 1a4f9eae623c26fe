"""What moves the weights is written down: their running mean, each step's learning rate, what decays."""

import math

import pytest
import torch
from torch import nn

from driftmap.models.backbones.dit import DiT
from driftmap.models.backbones.mlp import MLP
from driftmap.trainer.ema import Constant, Ema
from driftmap.trainer.fragment import Fragment
from driftmap.trainer.optim import adamw, learning_rate
from driftmap.trainer.recipe import OptimizerSection


def ema_of(model: nn.Module, *, decay: float) -> Ema:
    """Return the mean of a model that one process holds whole."""
    fragments = [
        Fragment(name, tuple(p.shape), 0, p.detach(), torch.zeros_like(p), torch.zeros_like(p), writes=True)
        for name, p in model.named_parameters()
    ]
    return Ema(fragments, {"ema": Constant(decay)})


def weights(ema: Ema, model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), ema.means["ema"], strict=True))


def nothing() -> None:
    """Refresh a model whose weights are its fragments."""


def jolt(model: nn.Module, seed: int) -> None:
    """Change every weight."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_mean_is_the_written_out_recursion(decay: float) -> None:
    model = MLP(width=8, depth=1)
    ema = ema_of(model, decay=decay)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for n in range(30):
        jolt(model, n)
        ema.update()
        keep = min(decay, (1 + n) / (10 + n))
        for name, parameter in model.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * parameter.detach().double()
    assert ema.num_updates == 30
    for name, mean in weights(ema, model).items():
        # To the last digits of fp32; without a decay the mean is the live weights themselves.
        tolerance = 2e-6 if decay else 0.0
        torch.testing.assert_close(mean.double(), expected[name], rtol=tolerance, atol=tolerance)
        assert not mean.requires_grad  # a mean with a graph would keep every step's weights alive


def test_the_mean_of_a_half_precision_model_moves_in_single_precision() -> None:
    """A thousandth of the smallest step of bf16 is lost in bf16, and the mean would stand still for ever."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = ema_of(model, decay=0.999)
    ema.num_updates = 10**6
    nn.init.constant_(model.weight, 1 + 2**-7)
    ema.update()
    assert weights(ema, model)["weight"].dtype == torch.float32
    assert weights(ema, model)["weight"].item() == pytest.approx(1 + 1e-3 * 2**-7, abs=1e-7)
    assert weights(ema, model)["weight"].item() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_is_undone_to_the_last_bit_even_after_an_exception(dtype: torch.dtype) -> None:
    model = MLP(width=8, depth=1).to(dtype)
    ema = ema_of(model, decay=0.9)
    jolt(model, 0)
    ema.update()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), ema.swapped_in(refresh=nothing):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights(ema, model)[name].to(dtype))
            assert not torch.equal(parameter, live[name])
        raise RuntimeError("in the middle")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, live[name])


def test_a_loaded_mean_goes_on_as_the_saved_one() -> None:
    models = [MLP(width=8, depth=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (ema_of(model, decay=0.99) for model in models)
    jolt(models[0], 0)
    first.update()
    for mean, other in zip(second.means["ema"], first.means["ema"], strict=True):
        mean.copy_(other)
    second.num_updates = first.num_updates
    for ema, model in zip((first, second), models, strict=True):
        jolt(model, 1)
        model.load_state_dict(models[0].state_dict())
        ema.update()
    for mean, other in zip(first.means["ema"], second.means["ema"], strict=True):
        assert torch.equal(mean, other)
    assert first.num_updates == second.num_updates == 2


SHAPES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("decay", SHAPES)
def test_the_learning_rate_of_every_step_is_the_written_out_one(decay, warmup: int) -> None:
    section = OptimizerSection(lr=3e-4, warmup_steps=warmup, decay=decay)
    for step in range(40):
        expected = (step + 1) / warmup if step < warmup else SHAPES[decay]((step - warmup) / (40 - warmup))
        assert learning_rate(section, step, num_steps=40) == pytest.approx(3e-4 * expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_reaches_zero_where_the_last_step_ends(decay) -> None:
    """No step is spent at a learning rate of zero, and none beyond the end has a negative one."""
    section = OptimizerSection(lr=1.0, warmup_steps=5, decay=decay)
    assert 0 < learning_rate(section, 39, num_steps=40) < 1 / 30
    assert learning_rate(section, 40, num_steps=40) == 0
    assert learning_rate(section, 60, num_steps=40) == 0


def test_the_learning_rate_depends_on_nothing_but_the_step() -> None:
    section = OptimizerSection(lr=1e-3, warmup_steps=5, decay="cosine")
    forwards = [learning_rate(section, step, num_steps=40) for step in range(40)]
    assert [learning_rate(section, step, num_steps=40) for step in reversed(range(40))] == forwards[::-1]


def test_weight_decay_shrinks_matrices_only() -> None:
    """Without gradients but those of zero, a step of AdamW is the decay alone."""
    model = DiT(sample_size=4, width=16, depth=1, num_heads=2, num_classes=3, qk_norm=True)
    jolt(model, 0)
    optimizer = adamw(OptimizerSection(lr=0.1, weight_decay=0.5), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter, factor * before[name])
    assert {p.dim() for p in model.parameters()} == {1, 2}


def test_the_optimizer_has_the_settings_of_its_section_and_no_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = adamw(OptimizerSection(lr=0.1, betas=(0.8, 0.95)), model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(0.1, (0.8, 0.95))}
