"""A loss has the gradient that its formula says: through the derivative or not, never through a target.

A frozen target is made by replaying what the teacher said at the first call; the gradient is then the one of
an ordinary function, and a finite difference of the loss in a parameter must give it. All in fp64.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from driftmap.models.backbones.mlp import MLP
from driftmap.models.flow_map import FlowMap
from driftmap.trainer.objective import mean_square
from driftmap.trainer.objectives.discrete_eulerian import DiscreteEulerian
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.tangent import time_derivative
from driftmap.trainer.times import Pairs
from oracle import exact, gaussian_batch

BATCH = gaussian_batch(64)
JUMPS = Pairs(diagonal=0)
RULES = {
    "semigroup": Semigroup(),
    "residual": Lagrangian(gradient="residual"),
    "semigradient": Lagrangian(gradient="semigradient"),
    "eulerian residual": Eulerian(gradient="residual"),
    "eulerian semigradient": Eulerian(velocity="self"),
    "improved mean flow": Eulerian(direction="self"),
    "its residual": Eulerian(direction="self", gradient="residual"),
    "discrete eulerian": DiscreteEulerian(velocity="self"),
    "flow matching": FlowMatching(),
}


def tiny() -> FlowMap:
    torch.manual_seed(0)
    return FlowMap(MLP(channels=5, width=8, depth=1)).double()


class Replay:
    """A teacher that says again what it said at its first calls, whatever it is asked."""

    def __init__(self) -> None:
        self.said: list[Tensor] = []
        self.call = 0

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the recorded velocity; the losses ask twice, for the diagonal and for the jumps."""
        if len(self.said) < 2:
            self.said.append(exact().velocity(x, t, condition))
        self.call += 1
        return self.said[(self.call - 1) % 2]


def gradients(rule: Any, model: FlowMap, teacher: Any = None, target: Any = None) -> list[Tensor]:
    """Return the gradient of the loss in every parameter of the model."""
    loss = rule(model, BATCH, teacher, target)["loss"]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def difference_quotient(rule: Any, model: FlowMap, teacher: Any, direction: list[Tensor]) -> Tensor:
    """Return the derivative of the loss along a direction of the parameters, by a central difference."""
    losses, step = [], 1e-6
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, towards in zip(moved.parameters(), direction, strict=True):
                parameter += sign * step * towards
        losses.append(rule(moved, BATCH, teacher)["loss"])
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("rule", [Lagrangian, Eulerian])
def test_the_residual_gradient_flows_through_the_derivative(rule: Any) -> None:
    model, teacher, residual = tiny(), Replay(), rule(gradient="residual")
    found = gradients(residual, model, teacher)
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]
    for direction in directions:
        expected = difference_quotient(residual, model, teacher, direction)
        along = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
        torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-8)
    frozen = gradients(rule(gradient="semigradient"), model, teacher)
    assert (torch.cat([(a - b).flatten() for a, b in zip(found, frozen, strict=True)])).norm() > 1e-3


@pytest.mark.parametrize("gradient", ["residual", "semigradient"])
@pytest.mark.parametrize("rule", [Lagrangian, Eulerian])
def test_both_derivatives_have_the_same_gradient(rule: Any, gradient: Any) -> None:
    exactly, nearly = (
        gradients(rule(gradient=gradient, derivative=how), tiny(), exact())
        for how in ("forward", "finite_difference")
    )
    for one, other in zip(nearly, exactly, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def frozen_regression(model: FlowMap, target: Tensor) -> list[Tensor]:
    """Return the gradient of the plain regression of all jumps of the batch onto a target."""
    x, s, t = jump_inputs()
    loss = mean_square(model.mean_velocity(x, s, t) - target).mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def jump_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return x_s, s and t of a batch that holds jumps only."""
    s, t = (time.double() for time in JUMPS.sample(BATCH.random, BATCH.step))
    return (1 - s)[:, None] * BATCH.data + s[:, None] * BATCH.noise(), s, t


def test_the_semigradient_is_that_of_regression_onto_the_frozen_target() -> None:
    model, (x, s, t) = tiny(), jump_inputs()
    with torch.no_grad():
        v, slope = time_derivative(lambda time: model.mean_velocity(x, s, time), t, how="forward")
        arrival = x + (t - s)[:, None] * v
        target = exact().velocity(arrival, t) - (t - s)[:, None] * slope
    found = gradients(Lagrangian(pairs=JUMPS, gradient="semigradient"), model, exact())
    torch.testing.assert_close(found, frozen_regression(model, target))


@pytest.mark.parametrize("velocity", ["teacher", "self", "conditional"])
@pytest.mark.parametrize("direction", ["velocity", "self"])
def test_the_eulerian_semigradient_is_that_of_regression_too(velocity: Any, direction: Any) -> None:
    """By torch.func's derivative along (x, s) itself, which the rule does not use."""
    if velocity == direction == "self":
        return
    model, (x, s, t) = tiny(), jump_inputs()
    with torch.no_grad():
        of_data = BATCH.noise() - BATCH.data
        own, taught = model.velocity(x, s), exact().velocity(x, s)
        b = {"teacher": taught, "self": own, "conditional": of_data}[velocity]
        along = own if direction == "self" else b
        _, slope = jvp(lambda x, s: model.mean_velocity(x, s, t), (x, s), (along, torch.ones_like(s)))
        target = b + (t - s)[:, None] * slope
    rule = Eulerian(pairs=JUMPS, velocity=velocity, direction=direction)
    torch.testing.assert_close(gradients(rule, model, exact()), frozen_regression(model, target))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_gradient_of_a_short_step_is_that_of_regression_onto_it_over_its_length(solver: Any) -> None:
    model, (x, s, t) = tiny(), jump_inputs()
    with torch.no_grad():
        u, b = s + 0.3 * (t - s), exact().velocity(x, s)
        if solver == "heun":
            b = (b + exact().velocity(x + (u - s)[:, None] * b, u)) / 2
        end = model.jump(x + (u - s)[:, None] * b, u, t)
        target = (end - x) / (t - s)[:, None]
    found = gradients(DiscreteEulerian(pairs=JUMPS, fraction=0.3, solver=solver), model, exact())
    expected = [gradient / 0.3 for gradient in frozen_regression(model, target)]
    torch.testing.assert_close(found, expected)


def test_the_semigroup_gradient_is_that_of_regression_onto_two_frozen_jumps() -> None:
    model, (x, s, t) = tiny(), jump_inputs()
    with torch.no_grad():
        u = (s + t) / 2
        end = model.jump(model.jump(x, s, u), u, t)
        target = (end - x) / (t - s)[:, None]
    found = gradients(Semigroup(pairs=JUMPS, split="half"), model)
    torch.testing.assert_close(found, frozen_regression(model, target))


FROM_ITSELF = {name: rule for name, rule in RULES.items() if name not in ("semigroup", "flow matching")}


@pytest.mark.parametrize("rule", FROM_ITSELF)
def test_a_network_that_teaches_itself_teaches_as_its_frozen_copy(rule: str) -> None:
    """Nothing flows through b, nor through the state where the Lagrangian rule asks for it, into the jump."""
    model, whole = tiny(), replace(FROM_ITSELF[rule], pairs=JUMPS)
    itself, copied = gradients(whole, model), gradients(whole, model, None, copy.deepcopy(model))
    torch.testing.assert_close(itself, copied, rtol=0, atol=0)
    moved = copy.deepcopy(model)
    moved.backbone.outputs.bias.data += 1
    assert not torch.allclose(copied[0], gradients(whole, model, None, moved)[0])


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_reaches_the_teacher(rule: str) -> None:
    model, teacher = tiny(), tiny()
    with torch.no_grad():
        teacher.backbone.outputs.bias += 1
    RULES[rule](model, BATCH, teacher)["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())
