"""Derivatives along a trajectory: of finite steps inside the limits, tamed, and sCM's on its own path."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from driftmap.models.backbones.mlp import MLP
from driftmap.models.denoiser import Denoiser
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Trig, expand
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.rule import Tangents
from driftmap.trainer.tangent import time_derivative
from driftmap.trainer.times import Pairs
from oracle import Blind, Recording, exact, gaussian_batch, pull

BATCH = gaussian_batch()
JUMPS = Pairs(diagonal=0)


def test_a_warm_up_a_norm_and_a_clamp_change_the_pull_and_not_the_raw_error() -> None:
    plain = Eulerian(pairs=JUMPS)
    g, bare = pull(plain, BATCH, exact()), pull(tamed(plain, warmup_steps=10**9), BATCH, exact())
    size = g.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(pull(tamed(plain, normalise=0.1), BATCH, exact()), g / (size + 0.1))
    torch.testing.assert_close(pull(tamed(plain, clamp=0.05), BATCH, exact()), g.clamp(-0.05, 0.05))
    both = pull(tamed(plain, normalise=0.1, clamp=0.5), BATCH, exact())
    torch.testing.assert_close(both, (g / (size + 0.1)).clamp(-0.5, 0.5))
    later = replace(BATCH, batch_size=64)  # four optimizer steps, in turn
    share = torch.tensor([0.25, 0.5, 0.75, 1.0]).double().repeat_interleave(64)[:, None]
    warmed = pull(tamed(plain, warmup_steps=4), later, exact())
    torch.testing.assert_close(warmed, bare + share * (g - bare), rtol=1e-6, atol=1e-8)
    assert (g - bare).norm() > 0.1 * g.norm()
    model = FlowMap(Blind())
    raw = plain(model, BATCH, exact())["error"]
    for options in ({"warmup_steps": 10}, {"normalise": 0.1}, {"clamp": 0.01}):
        losses = tamed(plain, **options)(model, BATCH, exact())
        assert torch.equal(losses["error"], raw) and losses["loss"] != raw.mean()


def tamed(rule: Any, **options: Any) -> Any:
    return replace(rule, tangents=Tangents(**options))


def test_the_lagrangian_semigradient_is_tamed_alike() -> None:
    plain = Lagrangian(pairs=JUMPS, gradient="semigradient")
    g = pull(plain, BATCH, exact())
    torch.testing.assert_close(pull(tamed(plain, clamp=0.05), BATCH, exact()), g.clamp(-0.05, 0.05))


@pytest.mark.parametrize("kind", [Lagrangian, Eulerian])
def test_a_rule_says_what_it_differentiates(kind: Any) -> None:
    assert kind(gradient="semigradient").tangent == "forward"
    assert kind(gradient="residual").tangent == "forward_with_gradient"
    for gradient in ("semigradient", "residual"):
        assert kind(gradient=gradient, derivative="finite_difference").tangent == "finite_difference"


@pytest.mark.parametrize("kind", [Lagrangian, Eulerian])
def test_a_residual_is_not_tamed(kind: Any) -> None:
    with pytest.raises(ValueError, match="tangents tame a semigradient"):
        kind(gradient="residual", tangents=Tangents(clamp=1.0))


# Steps of finite differences


@pytest.mark.parametrize("kind", [Lagrangian, Eulerian])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_stay_between_the_limits_and_on_their_side_of_the_jump(kind: Any, dtype: Any) -> None:
    pairs = Pairs(diagonal=0, from_noise=0.3, to_data=0.3, inverse=0.5, limits=(0.0, 0.93))
    batch, backbone = Batch(BATCH.data.to(dtype), None, BATCH.random), Recording()
    kind(pairs=pairs, derivative="finite_difference", gradient="semigradient")(
        FlowMap(backbone), batch, exact()
    )
    s, t = (time.to(dtype) for time in pairs.sample(batch.random, batch.step))
    jumps = [
        (later, end) for _, later, end, _ in backbone.calls if len(later) and not torch.equal(later, end)
    ]
    assert len(jumps) == 3  # the jump itself and two beside it
    for later, end in jumps:
        times = torch.cat([later, end])
        assert times.min() >= 0 and times.max() < 0.93 + 1e-6
        assert ((later - end).sign() * (s - t).sign() >= 0).all()


ENDS = {
    "inside": (0.5, 0.0, 1.0),
    "at the data": (0.0, 0.0, 1.0),
    "at the noise": (1.0, 0.0, 1.0),
    "beside the other time": (0.5, 0.499999, 1.0),
    "a short jump at the noise": (0.9999, 0.9995, 1.0),
}


@pytest.mark.parametrize("place", ENDS)
def test_a_difference_is_of_second_order_wherever_it_is(place: str) -> None:
    """In fp32 with its step of at most 1e-2: the bound is a third of step^2 times the third derivative."""
    time, *limits = (torch.full((3,), value) for value in ENDS[place])
    asked = []

    def wave(t: Tensor) -> Tensor:
        asked.append(t)
        return (20 * t + 1)[:, None].sin()

    low, high = limits
    _, slope = time_derivative(wave, time, how="finite_difference", within=(low, high))
    assert len(asked) == 3 and all((t >= low).all() and (t <= high).all() for t in asked)
    _, truth = time_derivative(wave, time, how="forward")
    torch.testing.assert_close(slope, truth, rtol=0, atol=20**3 * 1e-2**2 / 3 + 1e-2)


def test_in_half_precision_the_step_is_longer_and_the_derivative_still_one() -> None:
    """A network in bf16 says two digits: with the step of fp32 most of its derivative would be rounding."""
    torch.manual_seed(0)
    model, x, s = FlowMap(MLP(channels=5, width=64, depth=2)), BATCH.data.float(), torch.rand(256)
    t = s / 2

    def along(start: Tensor) -> Tensor:
        return model.mean_velocity(x + expand(start - s, x) * x, start, t)

    with torch.no_grad():
        _, truth = time_derivative(along, s, how="forward")
        ends = torch.zeros_like(s), torch.ones_like(s)
        with torch.autocast("cpu", torch.bfloat16):
            _, slope = time_derivative(along, s, how="finite_difference", within=ends)
            short = (along(s + 1e-2).float() - along(s - 1e-2)) / 2e-2
    error, short_error = ((found - truth).norm() / truth.norm() for found in (slope, short))
    assert error < 0.15 and error < 0.5 * short_error


# sCM


def test_on_the_quarter_circle_to_the_data_the_tangent_is_that_of_scm() -> None:
    """Of any network F: its own formula, in its own time a and with its own jump, against our rule's g."""
    torch.manual_seed(0)
    network = MLP(channels=5, width=16, depth=1).double()
    model = Denoiser(network, Trig(), prediction="v")  # whose jump is cos(a - c) x - sin(a - c) F
    rule = Eulerian(path=Trig(), pairs=Pairs(diagonal=0, to_data=1), velocity="teacher")
    s, t = (time.double() for time in rule.pairs.sample(BATCH.random, BATCH.step))
    a, x = math.pi / 2 * s, Trig().state(BATCH.data, BATCH.noise(), s)
    velocity = exact(path="trig").velocity(x, s) * 2 / math.pi  # dx/da

    def said(x: Tensor, a: Tensor) -> Tensor:
        return network(x, 2 / math.pi * a, t)

    f, slope = jvp(said, (x, a), (velocity, torch.ones_like(a)))
    cos, sin = expand(a.cos(), x), expand(a.sin(), x)
    tangent = -(cos**2) * (f - velocity) - cos * sin * (x + slope)
    torch.testing.assert_close(tangent, 2 / math.pi * cos * -pull(rule, BATCH, exact(path="trig"), of=model))
    # Of normalised tangents what is left of that factor is in c: sCM's is ours times (2 / pi) cos(a).
    normalised = replace(rule, tangents=Tangents(normalise=0.1))
    size = tangent.square().mean(1, keepdim=True).sqrt()
    expected = tangent / (size + 0.1 * 2 / math.pi * cos)
    torch.testing.assert_close(expected, -pull(normalised, BATCH, exact(path="trig"), of=model))
