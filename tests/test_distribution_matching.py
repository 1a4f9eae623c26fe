"""Distribution matching leaves the exact map alone and moves others to the data, without a third network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.trainer.config import ConfigError
from driftmap.trainer.objectives.distribution_matching import DistributionMatching
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.seeds import Random
from oracle import GaussianBackbone, exact, gaussian_batch

PATHS = {"linear": Linear(), "trig": Trig()}
every_path = pytest.mark.parametrize("path", PATHS)


class Movable(GaussianBackbone):
    """The exact map of N(mean, std^2), both to be learned; `shift` moves its samples, not its diagonal."""

    def __init__(self, *, mean, std=0.4, shift=0.0, path="linear"):
        super().__init__(path=path)
        for name, value in {"mean": mean, "std": std, "shift": shift}.items():
            if name in ("mean", "std"):
                delattr(self, name)
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def means(self, x, condition):
        """Return the mean, (B, 1)."""
        return self.mean.expand(len(x), 1)

    def forward(self, x, s, t, condition=None):
        """Return the mean velocity (B, 5)."""
        return super().forward(x, s, t, condition) + self.shift * (t - s)[:, None]


def shifted_batch(start):
    """Return samples at the positions from `start` on."""
    batch = gaussian_batch(128)
    return replace(batch, random=Random(batch.random.seed, batch.random.index + start))


def gradient(model, path, **settings):
    """Return the gradients of the loss, of the generator alone where the diagonal weighs next to nothing."""
    objective = DistributionMatching(path=PATHS[path], **settings)
    losses = objective(model, gaussian_batch(2048), exact(path=path))
    model.zero_grad()
    losses["loss"].backward()
    return {name: parameter.grad.item() for name, parameter in model.backbone.named_parameters()}, losses


@every_path
@pytest.mark.parametrize("one_jump", [0.0, 1.0])
def test_the_exact_map_is_left_alone(path, one_jump):
    found, losses = gradient(
        FlowMap(Movable(mean=0.7, path=path)), path, one_jump=one_jump, diagonal_weight=1e-9
    )
    assert losses["gap_to_teacher"].max() < 1e-12
    assert max(map(abs, found.values())) < 1e-7
    found, _ = gradient(FlowMap(Movable(mean=0.7, path=path)), path, one_jump=one_jump)
    assert max(map(abs, found.values())) < 0.1  # the regression's noise, of mean zero


@every_path
@pytest.mark.parametrize("wrong, sign", [({"mean": 1.2}, 1), ({"mean": 0.3}, -1)])
def test_a_shifted_map_is_pulled_to_the_data(path, wrong, sign):
    found, losses = gradient(FlowMap(Movable(**wrong, path=path)), path, diagonal_weight=1e-9)
    assert sign * found["mean"] > 0.05  # descent goes the other way
    assert losses["gap_to_teacher"].mean() > 0.05


def test_a_map_too_narrow_is_widened_and_one_too_wide_narrowed():
    for std, sign in ((0.2, -1), (0.8, 1)):
        found, _ = gradient(FlowMap(Movable(mean=0.7, std=std)), "linear", diagonal_weight=1e-9)
        assert sign * found["std"] > 0.02


def test_training_ends_at_the_data_though_the_diagonal_is_the_teachers_at_first():
    """It learns from the student's samples what they are, and then they are pulled to the data."""
    model, objective = FlowMap(Movable(mean=0.7, shift=0.6)), DistributionMatching()
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.2)
    batches = (shifted_batch(128 * step) for step in range(150))
    first = objective(model, next(batches), exact())
    assert first["gap_to_teacher"].max() < 1e-12
    for batch in batches:
        optimizer.zero_grad()
        objective(model, batch, exact())["loss"].backward()
        optimizer.step()
    mean, std, shift = (parameter.item() for parameter in model.backbone.parameters())
    assert abs(mean - 0.7) < 0.1 and abs(std - 0.4) < 0.1 and abs(shift) < 0.1


def test_the_diagonal_learns_the_velocity_of_the_students_own_samples():
    """Not the data's: samples shifted by 0.5 pull up the mean that the diagonal tells, whoever teaches."""
    model = FlowMap(Movable(mean=0.7, shift=0.5))  # X_{1,0} ends at a mean of 1.2
    objective = DistributionMatching(one_jump=1, diagonal_weight=1e3)
    objective(model, gaussian_batch(2048), exact())["loss"].backward()
    assert model.backbone.mean.grad.item() < -10


def test_no_gradient_goes_to_the_teacher_or_to_the_state_on_the_way():
    teacher, model = FlowMap(Movable(mean=0.7)), FlowMap(Movable(mean=1.2))
    DistributionMatching()(model, gaussian_batch(64), teacher)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    frozen = copy.deepcopy(model)
    batch = gaussian_batch(64)
    y = DistributionMatching(one_jump=0).samples(frozen, batch)
    x = frozen.jump(batch.noise(), torch.ones(64).double(), batch.random.uniform("source").double()).detach()
    last = frozen.jump(x, batch.random.uniform("source").double(), torch.zeros(64).double())
    assert torch.equal(y, last)
    one, two = (torch.autograd.grad(each.sum(), frozen.backbone.mean)[0] for each in (y, last))
    assert torch.equal(one, two)


def test_it_needs_a_teacher():
    recipe = {"data": {"shards": "shards", "batch_size": 8}, "optimizer": {"lr": 1e-3}}
    recipe |= {"model": {"name": "mlp", "channels": 2, "width": 8, "depth": 1}}
    recipe |= {"objective": {"name": "distribution_matching"}, "training": {"steps": 1}}
    with pytest.raises(ConfigError, match="teacher: the objective 'distribution_matching' needs one"):
        recipe_from(recipe)
    recipe_from(recipe | {"teacher": {"run": "runs/teacher"}})
