"""What the derivatives of the flow-map rules cost: over a plain forward, and over a flow-matching step.

The network is the quickstart's DiT at its batch size. Over a forward it is the value with its derivative in
the target time, or with the second value of a rule without derivatives. A step is a loss of the trainer, its
backward and the optimizer, on samples that lie ready. The rules are from scratch and have their defaults: a
quarter of the samples is on the diagonal and has no derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.flow_map import FlowMap
from ..trainer.build import make_network
from ..trainer.latents import Preparation
from ..trainer.loop import Task
from ..trainer.optim import adamw
from ..trainer.recipe import Recipe, recipe_from, resolved
from ..trainer.tangent import time_derivative
from .bench import alternate
from .quickstart import recipe_named

RULES: dict[str, dict[str, Any]] = {
    "forward mode": {"name": "eulerian"},
    "forward mode with gradient": {"name": "lagrangian"},
    "finite difference": {"name": "eulerian", "derivative": "finite_difference"},
    "discrete": {"name": "discrete_eulerian"},
    "discrete semigroup": {"name": "semigroup"},
}


def tangent(*, rounds: int, overrides: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the seconds of derivatives and of a plain forward, of rules' steps and of a flow-matching one.

    `overrides` change the recipe, that of the quickstart's teacher.
    """
    recipe = recipe_named("quickstart-teacher", overrides or [])
    samples = _samples(recipe)
    plain, derivatives = _forwards(recipe, samples)
    rows = [
        alternate(f"{name} / plain forward", ours, plain, rounds=rounds, steps=1, unit="s")
        for name, ours in derivatives.items()
    ]
    matching = _step(recipe, samples)
    for name, objective in RULES.items():
        ours = _step(with_objective(recipe, objective), samples)
        name = f"{name} step / flow-matching step"
        rows.append(alternate(name, ours, matching, rounds=rounds, steps=1, unit="s/step"))
    return rows


def with_objective(recipe: Recipe, objective: dict[str, Any]) -> Recipe:
    """Return a recipe with another objective."""
    return recipe_from({**resolved(recipe), "objective": objective})


def _samples(recipe: Recipe) -> dict[str, Tensor]:
    """Return random latents of the recipe's batch size and network, as a loader gives them."""
    network, generator = make_network(recipe.model), torch.Generator().manual_seed(0)
    assert isinstance(network, FlowMap)
    count = recipe.data.batch_size
    data = torch.randn(count, *network.sample_shape, generator=generator)
    return {"data": data, "label": torch.arange(count) % 10, "index": torch.arange(count)}


def _forwards(
    recipe: Recipe, samples: dict[str, Tensor]
) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """Return a plain forward of the network, and it with each derivative in the target time."""
    model = make_network(recipe.model)
    assert isinstance(model, FlowMap)
    x, label = samples["data"], samples["label"]
    s, t = torch.full((len(x),), 0.8), torch.full((len(x),), 0.3)

    def forward(time: Tensor) -> Tensor:
        return model.mean_velocity(x, s, time, label)

    @torch.no_grad()
    def derived(how: Any) -> None:
        time_derivative(forward, t, how=how)

    @torch.no_grad()
    def plain(times: int = 1) -> None:
        for _ in range(times):
            forward(t)

    return plain, {
        "forward mode": partial(derived, "forward"),
        "finite difference": partial(derived, "finite_difference"),
        "discrete": partial(plain, 2),
    }


def _step(recipe: Recipe, samples: dict[str, Tensor]) -> Callable[[], None]:
    """Return a step of a recipe on one batch."""
    model = make_network(recipe.model)
    task = Task(model, recipe.objective, prepare=Preparation(recipe.seed, torch.device("cpu")))
    optimizer = adamw(recipe.optimizer, model)

    def step() -> None:
        task(samples)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
