"""Every legal choice of rule, velocity, gradient and derivative is right on exact maps, no other is legal."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig, expand
from driftmap.trainer.config import ConfigError
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.discrete_eulerian import Annealed, DiscreteEulerian
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from driftmap.trainer.times import Pairs
from mixture import DATA, exact_mixture, reference_mixture
from oracle import Shifted, exact, gaussian_batch, pull

PATHS = {"linear": Linear(), "trig": Trig()}
BATCH = gaussian_batch()
JUMPS = Pairs(diagonal=0)
BOTH_WAYS = Pairs(diagonal=0.1, from_noise=0.2, inverse=0.5)
CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    Semigroup: {"velocity": ("teacher", "self", "conditional"), "split": ("uniform", "half")},
    Lagrangian: {
        "velocity": ("teacher", "self", "conditional"),
        "gradient": ("residual", "semigradient"),
        "derivative": ("forward", "finite_difference"),
    },
    Eulerian: {
        "velocity": ("teacher", "self", "conditional"),
        "gradient": ("residual", "semigradient"),
        "derivative": ("forward", "finite_difference"),
        "direction": ("velocity", "self"),
    },
    DiscreteEulerian: {"velocity": ("teacher", "self", "conditional"), "solver": ("euler", "heun")},
}


def refused(kind: type, chosen: dict[str, str]) -> str | None:
    """Return a word of the reason for which a choice is refused: what the mathematics says, not the code."""
    velocity = chosen["velocity"]
    if kind is Semigroup:
        return "no effect"  # its jumps learn from jumps
    if kind is Lagrangian and velocity == "conditional":
        return "where the jump arrives"
    if kind is DiscreteEulerian and velocity == "conditional" and chosen["solver"] == "heun":
        return "second velocity"
    if kind is Eulerian and chosen["direction"] == "self" and velocity == "self":
        return "no effect"
    if kind is Eulerian and velocity == "conditional" and chosen["direction"] == "velocity":
        return "learns a wrong map" if chosen["gradient"] == "residual" else None
    return None


def all_choices() -> list[tuple[type, dict[str, str]]]:
    return [
        (kind, dict(zip(settings, values, strict=True)))
        for kind, settings in CHOICES.items()
        for values in itertools.product(*settings.values())
    ]


def told(choice: tuple[type, dict[str, str]]) -> str:
    return f"{choice[0].__name__} {' '.join(choice[1].values())}"


LEGAL = [(kind, chosen) for kind, chosen in all_choices() if refused(kind, chosen) is None]
LEGAL += [(Semigroup, {"split": split}) for split in ("uniform", "half")]
EXACT = [choice for choice in LEGAL if choice[0] is not DiscreteEulerian]


@pytest.mark.parametrize("choice", [c for c in all_choices() if c not in LEGAL], ids=told)
def test_what_would_be_wrong_or_idle_is_refused_with_the_reason(choice: tuple[type, dict[str, str]]) -> None:
    kind, chosen = choice
    with pytest.raises(ValueError, match=refused(kind, chosen)):
        kind(**chosen)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("choice", EXACT, ids=told)
def test_every_legal_choice_vanishes_on_the_exact_map_towards_data_and_noise(choice: Any, path: Any) -> None:
    """With the data's velocity on data that are a point, where it is the marginal one."""
    kind, chosen = choice
    std = 0.0 if chosen.get("velocity") == "conditional" else 0.4
    batch, teacher = gaussian_batch(std=std), exact(std=std, path=path)
    rule = kind(path=PATHS[path], pairs=BOTH_WAYS, **chosen)
    losses = rule(exact(std=std, path=path), batch, teacher)
    assert losses["loss"] < (1e-13 if chosen.get("derivative") == "finite_difference" else 1e-20)
    assert 0.8 * 256 < len(losses["error_jump"]) < 256
    wrong = rule(FlowMap(Shifted(std=std, path=path)), batch, teacher)
    assert wrong["error_jump"].mean() > 1e-4


OF_MIXTURE = [
    Semigroup(),
    Lagrangian(),
    Lagrangian(gradient="semigradient", derivative="finite_difference"),
    Eulerian(),
    Eulerian(derivative="finite_difference"),
    Eulerian(gradient="residual"),
]


@pytest.mark.parametrize("rule", OF_MIXTURE, ids=lambda rule: f"{type(rule).__name__} {rule.tangent}")
def test_the_flow_of_a_mixture_by_runge_kutta_satisfies_every_rule(rule: Any) -> None:
    """It is known to about 1e-5, the fourth power of a step; no rule knows of Gaussians."""
    torch.manual_seed(0)
    batch = Batch(DATA.sample((32,)), None, Random(0, torch.arange(32)))
    rule = replace(rule, pairs=Pairs(diagonal=0, inverse=0.5))
    error = rule(reference_mixture(), batch, exact_mixture())["error"]
    assert error.mean() < 1e-9 and error.max() < 1e-7
    # The velocity alone, taken for the mean one over a jump.
    assert rule(exact_mixture(), batch, exact_mixture())["error"].mean() > 1e-2


def test_a_teacher_that_is_not_there_is_missed_at_once() -> None:
    with pytest.raises(ValueError, match="velocity: teacher, but there is no teacher"):
        Eulerian(velocity="teacher")(exact(), BATCH)
    settings = {
        "data": {"shards": "nowhere", "batch_size": 8},
        "model": {"name": "mlp"},
        "objective": {"name": "eulerian", "velocity": "teacher"},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 2},
    }
    with pytest.raises(ConfigError, match=r"^objective.velocity: teacher, but there is none"):
        recipe_from(settings)


@pytest.mark.parametrize("kind", [Lagrangian, Eulerian, DiscreteEulerian])
def test_a_target_network_is_asked_for_the_own_velocity(kind: Any) -> None:
    """An exact one teaches as an exact teacher does; the wrong network itself teaches something else."""
    rule, own = kind(pairs=JUMPS, velocity="self"), FlowMap(Shifted())
    assert rule.uses_target(taught=True)
    error = rule(own, BATCH, None, exact())["error"]
    torch.testing.assert_close(
        error, replace(rule, velocity="teacher")(own, BATCH, exact(), exact())["error"]
    )
    assert not torch.allclose(error, rule(own, BATCH)["error"], rtol=0.1)


@pytest.mark.parametrize("rule", [DiscreteEulerian(pairs=JUMPS, solver="heun"), Semigroup(pairs=JUMPS)])
def test_a_target_network_is_asked_for_shorter_jumps(rule: Any) -> None:
    assert rule(exact(), BATCH, exact())["error"].mean() < 1e-6
    assert rule(exact(), BATCH, exact(), FlowMap(Shifted()))["error"].mean() > 1e-3


# The short step in place of a derivative


def test_the_fraction_of_a_sample_depends_on_its_step_alone() -> None:
    def falls(shape: Any, start: float, end: float, **settings: Any) -> Tensor:
        steps = torch.tensor([0.0, 9.9, 10.0, 60.0, 110.0, 10**9]).double()
        return Annealed(shape=shape, start=start, end=end, steps=100, wait_steps=10, **settings)(steps)

    expected = torch.tensor([1, 1, 1, 0.75, 0.5, 0.5]).double()
    torch.testing.assert_close(falls("linear", 1, 0.5), expected)
    expected = torch.tensor([0.1, 0.1, 0.1, 0.01, 0.001, 0.001]).double()
    torch.testing.assert_close(falls("exponential", 0.1, 0.001), expected)
    expected = torch.tensor([1, 1, 1, 0.5025, 0.005, 0.005]).double()
    torch.testing.assert_close(falls("sigmoid", 1, 0.005), expected, rtol=0, atol=1e-5)
    doubling = Annealed(shape="exponential", start=1 / 10, end=1 / 1280, steps=80, stages=8)
    numbers = 1 / doubling(torch.tensor([0, 9, 10, 20, 30, 40, 50, 60, 70, 80, 90]).double())
    expected = torch.tensor([10, 10, 20, 40, 80, 160, 320, 640, 1280, 1280, 1280]).double()
    torch.testing.assert_close(numbers, expected)


def test_a_batch_of_several_steps_is_its_parts() -> None:
    whole = replace(BATCH, batch_size=64)
    anneal = Annealed(shape="exponential", start=0.5, end=0.01, steps=3)
    rule = DiscreteEulerian(pairs=JUMPS, fraction=anneal)
    errors = rule(exact(), whole, exact())["error"]
    for part in torch.arange(256).split(64):
        assert torch.equal(errors[part], rule(exact(), whole.take(part), exact())["error"])
    assert errors[:64].mean() > 100 * errors[192:].mean()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", PATHS)
def test_a_short_step_errs_on_the_exact_map_by_its_order(solver: Any, order: int, path: Any) -> None:
    teacher = exact(path=path)
    errors = [
        DiscreteEulerian(path=PATHS[path], pairs=BOTH_WAYS, fraction=a, solver=solver)(
            teacher, BATCH, teacher
        )["error_jump"]
        for a in (4e-3, 2e-3)
    ]
    ratio = (errors[0].mean() / errors[1].mean()).sqrt()
    assert abs(ratio.log2() - order) < 0.05


def test_a_short_step_is_exact_on_straight_trajectories() -> None:
    batch = gaussian_batch(std=0.0)
    rule = DiscreteEulerian(pairs=BOTH_WAYS, velocity="conditional", fraction=0.5)
    assert rule(exact(std=0.0), batch)["error"].max() < 1e-20
    assert rule(FlowMap(Shifted(std=0.0)), batch)["error_jump"].mean() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_the_pull_of_a_short_step_tends_to_the_eulerian_semigradient(path: Any) -> None:
    limit = pull(Eulerian(path=PATHS[path], pairs=JUMPS), BATCH, exact(path=path))
    errors = []
    for a in (2e-3, 1e-3):
        rule = DiscreteEulerian(path=PATHS[path], pairs=JUMPS, fraction=a)
        errors.append((pull(rule, BATCH, exact(path=path)) - limit).norm() / limit.norm())
    assert errors[1] < 5e-3 and 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize(
    "rule",
    [
        Eulerian(pairs=JUMPS),
        Eulerian(pairs=JUMPS, path=Trig()),
        Eulerian(pairs=JUMPS, derivative="finite_difference"),
        Eulerian(pairs=JUMPS, direction="self"),
        DiscreteEulerian(pairs=JUMPS, fraction=1e-3),
    ],
    ids=lambda rule: f"{type(rule).__name__} {rule.path.name} {rule.tangent}",
)
def test_the_velocity_of_the_data_pulls_as_the_marginal_one_in_the_mean(rule: Any) -> None:
    """By sample it pulls elsewhere; summed against functions of the state the difference is only noise."""
    batch = gaussian_batch(20000)
    teacher = exact(path=rule.path.name)
    difference = pull(rule, batch) - pull(rule, batch, teacher)
    s, _ = JUMPS.sample(batch.random, batch.step)
    x = rule.path.state(batch.data, batch.noise(), s.double())
    assert difference.square().mean() > 1e-2
    for function in (torch.ones_like(x), x, x**2, expand(s, x) * x):
        terms = (difference * function).flatten()
        assert terms.mean().abs() < 4 * terms.std() / len(terms) ** 0.5
