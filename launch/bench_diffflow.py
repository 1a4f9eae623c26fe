"""What a step of DiffFlow costs beside one that simulates again, as the method was published.

The reference keeps the states of the chain only, goes back over its steps one by one, and adds up gradients
as one flat vector: for N steps 3 N evaluations forward, 3 N more with their gradients. It is written from the
mathematics: with the noise of the step back

    dB_n = (x_{n-1} - x_n + h (f_n(x_n) - g^2 s_n(x_n))) / (g h^(1/2)),   L = sum_n |dB_n|^2 / 2 + |x_N|^2 / 2

the gradient of |dB_n|^2 / 2 to x_{n-1}, x_n and the weights, then that of x_n = x_{n-1} + h f_{n-1}(x_{n-1})
to x_{n-1} and the weights, for the gradient that has come to x_n. Networks and batch are the same.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.flow_map import FlowMap
from ..trainer.build import make_network
from ..trainer.latents import Preparation
from ..trainer.loop import Task
from ..trainer.objective import Objective
from ..trainer.objectives.diffflow import DiffFlow
from ..trainer.optim import adamw
from ..trainer.recipe import OptimizerSection
from .bench import alternate

NETWORK = {"name": "mlp", "width": 125, "depth": 3}  # about as many parameters as were published: 99.7 k
VOLATILITY = {"name": "constant", "g": 0.0447}
ROWS = {"two networks": False, "shared trunk": True}


def diffflow(*, rounds: int, batch_size: int = 1000, num_steps: int = 30) -> list[dict[str, Any]]:
    """Return the seconds of a node, in a step of training, of ours and of the reference."""
    reference = _reference_step(batch_size, num_steps)
    return [
        alternate(
            f"{name}, N = {num_steps}, batch {batch_size} / simulated again",
            _step(batch_size, num_steps, shared=shared),
            reference,
            rounds=rounds,
            steps=num_steps,
            unit="s/node",
        )
        for name, shared in ROWS.items()
    ]


def model_of(objective: DiffFlow) -> FlowMap:
    """Return the model of the benchmark, for points."""
    heads = 1 + objective.shared
    model = make_network({**NETWORK, "out_channels": 2 * heads, "means": objective.meaning()})
    assert isinstance(model, FlowMap)
    return model


def _step(batch_size: int, num_steps: int, *, shared: bool) -> Callable[[], None]:
    """Return a step of the trainer's task and optimizer."""
    objective = DiffFlow(num_steps=num_steps, shared=shared)
    model = model_of(objective)
    task = Task(
        model, cast(Objective, objective), prepare=Preparation(0, torch.device("cpu"), batch_size=batch_size)
    )
    optimizer = adamw(OptimizerSection(lr=1e-3), model)
    samples = {"data": torch.randn(batch_size, 2), "index": torch.arange(batch_size)}

    def step() -> None:
        task(samples)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _reference_step(batch_size: int, num_steps: int) -> Callable[[], None]:
    objective = DiffFlow(num_steps=num_steps)
    model: Any = model_of(objective)
    networks, grid = (model.drift, model.backbone), model.grid().float()
    optimizer = adamw(OptimizerSection(lr=1e-3), model)
    data = torch.randn(batch_size, 2)

    def step() -> None:
        _, flat = simulated_again(*networks, data, grid, g=0.0447, noise=lambda n: torch.randn_like(data))
        parameters = [parameter for network in networks for parameter in network.parameters()]
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter) / data.numel()
        optimizer.step()

    return step


def simulated_again(
    drift: nn.Module,
    score: nn.Module,
    data: Tensor,
    grid: Tensor,
    *,
    g: float,
    noise: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the loss, summed over samples, and its gradient to the weights as one vector."""
    times = [t.expand(len(data)) for t in grid]
    parameters = [*drift.parameters(), *score.parameters()]

    def ask(network: nn.Module, x: Tensor, n: int) -> Tensor:
        return network(x, times[n], times[n])

    def back(before: Tensor, x: Tensor, n: int) -> Tensor:
        h = grid[n] - grid[n - 1]
        gap = before - x + h * (ask(drift, x, n) - g**2 * ask(score, x, n))
        return (gap / (g * h.sqrt())).square().sum() / 2

    states, loss = [data], torch.zeros((), dtype=data.dtype)
    with torch.no_grad():
        for n, (t, later) in enumerate(pairwise(grid), start=1):
            eps = noise(n)
            x = states[-1] + (later - t) * ask(drift, states[-1], n - 1) + g * (later - t).sqrt() * eps
            loss += back(states[-1], x, n) - eps.square().sum() / 2
            states.append(x)
    gradient = states[-1]  # of |x_N|^2 / 2
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=data.dtype)
    for n in range(len(states) - 1, 0, -1):
        before, x = (state.detach().requires_grad_() for state in states[n - 1 : n + 1])
        to_before, to_x, *parts = torch.autograd.grad(back(before, x, n), [before, x, *parameters])
        total = total + _flat(parts, parameters)
        mean = before + (grid[n] - grid[n - 1]) * ask(drift, before, n - 1)
        on, *parts = torch.autograd.grad(mean, [before, *parameters], gradient + to_x, allow_unused=True)
        total = total + _flat(parts, parameters)
        gradient = on + to_before
    return loss + states[-1].square().sum() / 2, total


def _flat(parts: Sequence[Tensor | None], parameters: list[nn.Parameter]) -> Tensor:
    """Return gradients as one vector, 0 where there is none."""
    pairs = zip(parts, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for part, p in pairs])
