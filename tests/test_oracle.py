"""Every flow-map loss, with all its options, vanishes on the exact flow of Gaussian data and nowhere else."""

import math
from typing import Any

import pytest
import torch

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.times import LogitNormal, Pairs
from oracle import (
    CLASS_MEANS,
    Blind,
    Hurried,
    LateError,
    Recording,
    Reversed,
    Shifted,
    exact,
    gaussian_batch,
)

PATHS = {"linear": Linear(), "trig": Trig()}
PAIRS = {
    "default": Pairs(),
    "jumps only": Pairs(diagonal=0),
    "diagonal only": Pairs(diagonal=1),
    "from noise": Pairs(from_noise=1),
    "to data": Pairs(to_data=1),
    "the whole way": Pairs(from_noise=1, to_data=1, times=LogitNormal("logit_normal", -0.4)),
}
# Jumps learn from their own diagonal where there is no teacher; test_rules.py has all other choices.
DERIVATIVES = [(g, d) for g in ("residual", "semigradient") for d in ("forward", "finite_difference")]
RULES: dict[str, tuple[type, dict[str, str]]] = {
    "semigroup uniform": (Semigroup, {"split": "uniform"}),
    "semigroup half": (Semigroup, {"split": "half"}),
}
for gradient, derivative in DERIVATIVES:
    settings, name = {"gradient": gradient, "derivative": derivative}, f"{gradient}, {derivative}"
    RULES[f"lagrangian {name}"] = (Lagrangian, settings)
    RULES[f"eulerian {name}"] = (Eulerian, settings | {"velocity": "self"})
WRONG = {"shifted": Shifted, "hurried": Hurried}
BATCH = gaussian_batch()
# A central difference errs by step^2 / 6 times the third derivative, 1e-5^2 / 6 * 100: 1e-9, squared 1e-18.
ZERO = {rule: 1e-15 if "difference" in rule else 1e-20 for rule in RULES}
every_rule = pytest.mark.parametrize("rule", RULES)
every_path = pytest.mark.parametrize("path", PATHS)
every_pairs = pytest.mark.parametrize("pairs", PAIRS)
every_wrong_map = pytest.mark.parametrize("wrong", WRONG)


def objective(rule: str, path: str = "linear", pairs: str = "default") -> Any:
    kind, settings = RULES[rule]
    return kind(path=PATHS[path], pairs=PAIRS[pairs], **settings)


@pytest.mark.parametrize("mean, std", [(0.7, 0.4), (-1.0, 1.3), (0.7, 0.0)])
@every_path
def test_the_oracle_is_the_flow(path: Any, mean: float, std: float) -> None:
    """X is X_{s,t}(x) in closed form; its diagonal is alpha' E[data | x] + sigma' E[noise | x]."""
    flow, curve = exact(mean=mean, std=std, path=path), PATHS[path]
    x, s, t = BATCH.data, torch.linspace(0.1, 1, 256).double(), torch.linspace(0.8, 0.05, 256).double()
    alpha, sigma, later_alpha, later_sigma = (
        c[:, None] for c in (curve.alpha(s), curve.sigma(s), curve.alpha(t), curve.sigma(t))
    )
    spread, later = ((a * std) ** 2 + b**2 for a, b in ((alpha, sigma), (later_alpha, later_sigma)))
    expected = later_alpha * mean + (later / spread).sqrt() * (x - alpha * mean)
    torch.testing.assert_close(flow.jump(x, s, t), expected)
    centred = (x - alpha * mean) / spread
    velocity = curve.velocity(mean + alpha * std**2 * centred, sigma * centred, s)
    torch.testing.assert_close(flow.velocity(x, s), velocity)


@every_pairs
@every_path
@every_rule
def test_the_exact_map_taught_by_the_exact_velocity_has_no_loss(rule: str, path: Any, pairs: str) -> None:
    losses = objective(rule, path, pairs)(exact(path=path), BATCH, exact(path=path))
    assert losses["loss"] < ZERO[rule]
    assert losses["error"].shape == (256,)
    assert losses["error"].max() < 100 * ZERO[rule]
    assert len(losses["error_jump"]) == {"jumps only": 256, "diagonal only": 0}.get(
        pairs, len(losses["error_jump"])
    )
    assert len(losses["error_jump"]) + len(losses["error_diagonal"]) == 256


@every_wrong_map
@every_pairs
@every_path
@every_rule
def test_a_wrong_map_has_a_loss(rule: str, path: Any, pairs: str, wrong: str) -> None:
    losses = objective(rule, path, pairs)(FlowMap(WRONG[wrong](path=path)), BATCH, exact(path=path))
    assert losses["loss"] > 1e-5
    # What is hurried is not wrong at 0 and 1, and this rule asks for jumps to the same end only.
    seen = (pairs, wrong) != ("the whole way", "hurried") or "eulerian" not in rule
    assert not len(losses["error_diagonal"]) or losses["error_diagonal"].mean() > 1e-5
    assert not len(losses["error_jump"]) or (losses["error_jump"].mean() > 1e-5) == seen


@pytest.mark.parametrize("how", ["forward", "finite_difference"])
@pytest.mark.parametrize("gradient", ["residual", "semigradient"])
def test_the_lagrangian_rule_is_blind_at_the_data_end_of_the_trig_path_only(gradient: Any, how: Any) -> None:
    """There the velocity is 0, so that a reversed flow arrives just as still; all other pairs betray it."""
    for path, to_data, seen in (("trig", 1, False), ("trig", 0, True), ("linear", 1, True)):
        pairs = Pairs(diagonal=0, to_data=to_data)
        rule = Lagrangian(PATHS[path], pairs, gradient=gradient, derivative=how)
        loss = rule(FlowMap(Reversed(path=path)), BATCH, exact(path=path))["loss"]
        assert (loss > 1e-5) == seen


@every_path
@every_rule
def test_of_a_point_the_data_alone_teach_the_exact_map(rule: str, path: Any) -> None:
    """Where all data are one point, the conditional velocity is the marginal one: no teacher is needed."""
    batch = gaussian_batch(std=0.0)
    losses = objective(rule, path)(exact(std=0.0, path=path), batch)
    assert losses["loss"] < ZERO[rule]
    assert objective(rule, path)(FlowMap(Shifted(std=0.0, path=path)), batch)["loss"] > 1e-5


@every_path
@every_rule
def test_without_a_teacher_the_diagonal_teaches_the_jumps(rule: str, path: Any) -> None:
    """Of spread-out data the conditional velocity scatters around the marginal one; jumps do not see it."""
    losses = objective(rule, path)(exact(path=path), BATCH)
    assert losses["error_jump"].mean() < ZERO[rule]
    assert losses["error_diagonal"].mean() > 0.1


@every_rule
def test_without_a_teacher_a_flow_of_other_data_is_betrayed_by_the_diagonal_only(rule: str) -> None:
    other = exact(mean=-0.2, std=0.9)
    losses = objective(rule)(other, BATCH)
    assert losses["error_jump"].mean() < ZERO[rule]
    assert losses["error_diagonal"].mean() - objective(rule)(exact(), BATCH)["error_diagonal"].mean() > 1e-2
    assert objective(rule)(other, BATCH, exact())["error_diagonal"].mean() > 1e-2


@every_rule
def test_a_student_at_birth_is_right_on_the_diagonal_and_wrong_in_its_jumps(rule: str) -> None:
    losses = objective(rule)(FlowMap(Blind()), BATCH, exact())
    assert losses["error_diagonal"].mean() < 1e-20
    assert losses["error_jump"].mean() > 1e-5


@pytest.mark.parametrize("std", [0.0, 0.4])
@every_rule
def test_each_sample_is_taught_under_its_own_class(rule: str, std: float) -> None:
    """The classes have different flows: a label that is lost or given to another sample leaves a loss."""
    batch = gaussian_batch(std=std, labels=True)
    teacher = None if std == 0 else exact(std=std)
    assert objective(rule)(exact(std=std), batch, teacher)["loss"] < ZERO[rule]
    swapped = Batch(batch.data, 1 - batch.condition, batch.random)
    assert objective(rule)(exact(std=std), swapped, exact(std=std))["loss"] < ZERO[rule]
    assert std or objective(rule)(exact(std=0.0), swapped)["loss"] > 1e-5


@pytest.mark.parametrize("wrong", [Shifted, Reversed])
@pytest.mark.parametrize("times", [LogitNormal("logit_normal"), LogitNormal("logit_normal", 1.0, 2.0)])
@every_path
def test_flow_matching_vanishes_on_the_exact_velocity_only(path: Any, times: Any, wrong: Any) -> None:
    loss = FlowMatching(path=PATHS[path], times=times)
    point = gaussian_batch(std=0.0)
    assert loss(exact(path=path), BATCH, exact(path=path))["loss"] < 1e-20
    assert loss(exact(std=0.0, path=path), point)["loss"] < 1e-20
    assert loss(FlowMap(wrong(path=path)), BATCH, exact(path=path))["loss"] > 1e-5
    assert loss(FlowMap(wrong(std=0.0, path=path)), point)["loss"] > 1e-5


def test_flow_matching_drops_the_asked_share_of_labels() -> None:
    batch = gaussian_batch(2000, labels=True)
    for share in (0.0, 0.3, 1.0):
        backbone = Recording()
        FlowMatching(condition_dropout=share)(FlowMap(backbone), batch)
        ((_, _, _, condition),) = backbone.calls
        assert condition is not None
        dropped = condition == len(CLASS_MEANS)
        assert torch.equal(condition[~dropped], batch.condition[~dropped])
        assert abs(dropped.double().mean() - share) < 4 * math.sqrt(share * (1 - share) / 2000) + 1e-9


def test_flow_matching_drops_no_label_unless_asked_and_takes_data_without_labels() -> None:
    batch, backbone = gaussian_batch(labels=True), Recording()
    FlowMatching()(FlowMap(backbone), batch)
    assert backbone.calls[0][3] is batch.condition
    FlowMatching(condition_dropout=0.5)(FlowMap(backbone), BATCH)
    assert backbone.calls[1][3] is None


@every_path
@every_rule
def test_jumps_and_diagonal_start_on_the_path_of_their_own_sample(rule: str, path: Any) -> None:
    """Every loss vanishes on the exact map wherever x is, so what x is has to be seen."""
    backbone, whole = Recording(), objective(rule, path)
    s, t = (time.double() for time in whole.pairs.sample(BATCH.random, BATCH.step))
    whole(FlowMap(backbone), BATCH)
    jumps, noise = t < s, BATCH.random.normal("noise", (5,)).double()
    alpha, sigma = (1 - s, s) if path == "linear" else ((s * math.pi / 2).cos(), (s * math.pi / 2).sin())
    state = alpha[:, None] * BATCH.data + sigma[:, None] * noise
    (x_diagonal, s_diagonal, t_diagonal, _), (x, s_jump, _, _), *_ = backbone.calls
    torch.testing.assert_close(x_diagonal, state[~jumps])
    torch.testing.assert_close(x, state[jumps])
    assert torch.equal(s_diagonal, s[~jumps]) and torch.equal(t_diagonal, s[~jumps])
    assert torch.equal(s_jump, s[jumps])


@every_rule
def test_an_error_is_logged_at_the_source_time_of_its_sample(rule: str) -> None:
    losses = objective(rule)(FlowMap(LateError()), BATCH, exact())
    assert torch.equal(losses["error"] > 100 * ZERO[rule], losses["time"] > 0.5)
    assert torch.equal(losses["error"], torch.cat([losses["error_jump"], losses["error_diagonal"]]))
    assert torch.equal(losses["gap"] > 0, torch.arange(256) < len(losses["error_jump"]))
    torch.testing.assert_close(losses["loss"], losses["error"].mean())
    matching = FlowMatching()(FlowMap(LateError()), BATCH, exact())
    assert torch.equal(matching["error"] > 0.5, matching["time"] > 0.5)
    torch.testing.assert_close(matching["loss"], matching["error"].mean())


@pytest.mark.parametrize("settings, mean, std", [((), 0.0, 1.0), ((0.5, 2.0), 0.5, 2.0)])
def test_logit_normal_times_have_the_median_and_the_spread_asked_for(settings: Any, mean: float, std: float):
    random = gaussian_batch(5000).random
    logits = torch.logit(LogitNormal("logit_normal", *settings).sample(random).double())
    assert abs(logits.mean() - mean) < 4 * std / math.sqrt(5000)
    assert abs(logits.std() - std) < 4 * std / math.sqrt(2 * 5000)


def test_in_single_precision_the_central_difference_keeps_two_digits() -> None:
    """The step of fp32 is 1e-2: a fp64 step would drown in rounding and lose every digit."""
    batch = gaussian_batch()
    single = Batch(batch.data.float(), None, batch.random)
    rule = objective("lagrangian residual, finite_difference")
    assert rule(exact(), single, exact())["error_jump"].mean() < 1e-5
    assert rule(FlowMap(Shifted()), single, exact())["error_jump"].mean() > 1e-3
