"""A network that guides itself learns the guided velocity from data: exactly that one is its fixed point."""

import pytest
import torch
from pydantic import ValidationError

from driftmap.models.condition import Text, no_text, says_nothing
from driftmap.models.flow_map import FlowMap
from driftmap.trainer import cost
from driftmap.trainer.config import ConfigError
from driftmap.trainer.guiding import SelfGuidance
from driftmap.trainer.objective import path_velocity
from driftmap.trainer.objectives.discrete_eulerian import DiscreteEulerian
from driftmap.trainer.objectives.eulerian import Eulerian
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.times import LogitNormal, Pairs
from oracle import GaussianBackbone, Recording, exact, gaussian_batch

SCALE = 2.5
# Each class is a point, so that the velocity of a sample is that of its class.
BATCH = gaussian_batch(std=0.0, labels=True)
SETTINGS = {
    "data": {"shards": "none", "batch_size": 32},
    "model": {"name": "mlp", "num_classes": 3},
    "objective": {"name": "flow_matching", "condition_dropout": 0.25, "guidance": {"scale": 2.0}},
    "optimizer": {"lr": 1e-3},
    "training": {"steps": 2},
}
TIMES = 0.05 + 0.9 * BATCH.random.uniform("time").double()


class GuidedGaussian(GaussianBackbone):
    """Has the guided velocity of each class, and the exact one without a class; on the diagonal only."""

    def __init__(self) -> None:
        super().__init__(std=0.0)

    def forward(self, x, s, t, condition=None):
        """Return the velocity (B, 5)."""
        of_class, without = (super(GuidedGaussian, self).forward(x, s, t, c) for c in (condition, None))
        told = (condition != self.null_label)[:, None]
        return torch.where(told, without + SCALE * (of_class - without), without)


class Weighted(Recording):
    """Exact, with a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()).double())

    def forward(self, x, s, t, condition=None):
        """Return the mean velocity (B, 5)."""
        return self.weight * super().forward(x, s, t, condition)


@pytest.mark.parametrize("kappa", [None, 0.3, 0.9])
def test_the_guided_velocity_is_the_fixed_point(kappa):
    objective = FlowMatching(guidance=SelfGuidance(scale=SCALE, kappa=kappa), condition_dropout=0.5)
    error = objective(FlowMap(GuidedGaussian()), BATCH)["error"]
    dropped = says_nothing(BATCH.with_condition_dropped(0.5, null=2).condition, 2)
    assert 100 < dropped.sum() < 156
    assert error[~dropped].max() < 1e-20
    wrong = objective(exact(std=0.0), BATCH)["error"]
    assert wrong[~dropped].mean() > 0.1


def test_samples_without_a_condition_and_outside_the_interval_learn_from_data_alone():
    batch = BATCH.with_condition_dropped(0.5, null=2)
    guide = SelfGuidance(scale=SCALE, interval=(0.3, 0.6)).by(exact(std=0.0))
    _, plain = path_velocity(objective_path(), batch, TIMES, None)
    _, guided = path_velocity(objective_path(), batch, TIMES, guide)
    changed = (plain != guided).any(1)
    inside = (TIMES >= 0.3) & (TIMES <= 0.6) & ~says_nothing(batch.condition, 2)
    assert torch.equal(changed, inside) and 20 < inside.sum() < 60


def objective_path():
    return FlowMatching().path


def test_only_rows_that_are_guided_cost_anything_and_no_gradient_goes_through_them():
    backbone = Weighted()
    batch = BATCH.with_condition_dropped(0.5, null=2)
    guide = SelfGuidance(scale=SCALE).by(FlowMap(backbone))
    _, velocity = path_velocity(objective_path(), batch, TIMES, guide)
    assert [len(x) for x, *_ in backbone.calls] == [2 * (~says_nothing(batch.condition, 2)).sum()]
    assert not velocity.requires_grad and backbone(BATCH.data, TIMES, TIMES).requires_grad


@pytest.mark.parametrize("rule", [Semigroup, Eulerian, DiscreteEulerian, Lagrangian])
def test_the_diagonal_of_every_rule_learns_the_guided_velocity(rule):
    objective = rule(
        pairs=Pairs(diagonal=0.5), guidance=SelfGuidance(scale=SCALE), condition_dropout=0.5, velocity=None
    )
    batch = gaussian_batch(std=0.0, labels=True)
    losses = objective(FlowMap(GuidedGaussian()), batch)
    dropped = says_nothing(batch.with_condition_dropped(0.5, null=2).condition, 2)[losses["index"]]
    diagonal = losses["gap"] == 0
    assert losses["error"][diagonal & ~dropped].max() < 1e-20
    plain = rule(pairs=Pairs(diagonal=0.5), condition_dropout=0.5)(FlowMap(GuidedGaussian()), batch)["error"]
    assert plain[diagonal & ~dropped].mean() > 0.1


@pytest.mark.parametrize("rule", [Eulerian, DiscreteEulerian])
def test_jumps_that_learn_from_data_learn_the_guided_velocity(rule):
    """A jump of vanishing length is all but the velocity: its error tells from what it learned."""
    settings = {
        "pairs": Pairs(diagonal=0.0, gap=LogitNormal("logit_normal", mean=-12)),
        "condition_dropout": 0.5,
    }
    settings |= {"fraction": 1.0} if rule is DiscreteEulerian else {}
    network = FlowMap(GuidedGaussian())
    plain = rule(**settings)(network, BATCH)
    guided = rule(**settings, guidance=SelfGuidance(scale=SCALE))(network, BATCH)
    dropped = says_nothing(BATCH.with_condition_dropped(0.5, null=2).condition, 2)
    assert guided["error"][~dropped].max() < 1e-6 < 0.1 < plain["error"][~dropped].mean()
    torch.testing.assert_close(guided["error"][dropped], plain["error"][dropped])


def test_a_target_network_guides_in_place_of_the_own_one():
    objective = FlowMatching(guidance=SelfGuidance(scale=SCALE), condition_dropout=0.1)
    own, target = Recording(), Recording()
    objective(FlowMap(own), BATCH, None, FlowMap(target))
    assert (len(own.calls), len(target.calls)) == (1, 1)


def test_the_plan_counts_what_it_costs():
    calls = cost.evaluations(recipe_from(SETTINGS))
    found = {evaluation.gradient: count for evaluation, count in calls.items()}
    assert found == {True: 1, False: pytest.approx(2 * 0.75, abs=0.06)}


def test_guidance_and_a_teacher_are_refused():
    with pytest.raises(
        ConfigError, match=r"^objective\.guidance: .* set teacher\.guidance, or remove teacher"
    ):
        recipe_from({**SETTINGS, "teacher": {"run": "none"}})


def test_a_caption_without_tokens_says_nothing():
    tokens, mask = torch.zeros(3, 2, 4), torch.tensor([[True, True], [False, False], [True, False]])
    assert says_nothing(Text(tokens, mask), no_text()).tolist() == [False, True, False]


def test_guidance_without_dropout_or_classes_is_refused():
    with pytest.raises(ValidationError, match="which no sample would teach; set condition_dropout"):
        FlowMatching(guidance=SelfGuidance(scale=SCALE))
    with pytest.raises(ValueError, match="guidance needs a model of classes or captions"):
        SelfGuidance(scale=2.0).by(exact()).guided(BATCH.data, BATCH.data, TIMES, None)
    with pytest.raises(ValidationError, match="scale"):
        SelfGuidance(scale=1.0)
