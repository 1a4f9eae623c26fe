"""Metrics are those of the literature, to the digits that others compute, from streams that are not kept."""

import gc

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from driftmap.trainer.features import Features
from driftmap.trainer.judge import MOST_KEPT, Judge, Meter, Prompts
from driftmap.trainer.metrics.blindness import blind_metrics
from driftmap.trainer.metrics.chosen import chosen, partners
from driftmap.trainer.metrics.frechet import Moments, frechet_distance
from driftmap.trainer.metrics.kernel import discrepancy, kernel_distance
from driftmap.trainer.metrics.neighbours import Cloud, neighbour_shares
from driftmap.trainer.strategy import process_group
from driftmap.trainer.world import World


class HandedThrough(nn.Module):
    """Hands features through, so that a metric of pictures becomes one of features."""

    num_features = 6

    def forward(self, features):
        """Return what is given."""
        return features


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(features, parts=1):
    found = Moments.empty(features.shape[1])
    for part in features.tensor_split(parts):
        found.update(part)
    return found


@pytest.fixture
def sets():
    return normal(400, 6) @ normal(6, 6, seed=1), normal(300, 6, seed=2) @ normal(6, 6, seed=3) + 0.5


def test_moments_of_any_parts_are_those_of_the_whole_far_from_zero_too(sets):
    """Sums of squares would leave nothing of a covariance of size 1 around a mean of a million."""
    features = sets[0] + 1e6
    for parts in (1, 7, 400):
        found = moments(features, parts)
        assert found.count == 400
        assert torch.allclose(found.mean, features.mean(0), rtol=1e-14)
        assert torch.allclose(found.covariance, features.T.cov(), rtol=1e-8)


def test_frechet_distance_equals_torchmetrics(sets):
    reference = FrechetInceptionDistance(feature=HandedThrough(), input_img_size=(6,))
    reference.set_dtype(torch.float64)
    reference.update(sets[0], real=True)
    reference.update(sets[1], real=False)
    distance = frechet_distance(moments(sets[0], 3), moments(sets[1], 5))
    assert distance == pytest.approx(reference.compute().item(), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Sets that differ by a shift alone: the distance is its square; by a scale a: (a - 1)^2 tr C."""
    points = normal(500, 4)
    first = moments(points)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(first, moments(points + torch.tensor([3, 0, 0, 4]))) == pytest.approx(25)
    centred = points - points.mean(0)
    scaled = frechet_distance(moments(centred), moments(3 * centred))
    assert scaled == pytest.approx(4 * first.covariance.trace().item())


def test_frechet_distance_of_fewer_samples_than_features_is_no_noise():
    few = normal(10, 40)
    assert frechet_distance(moments(few), moments(few)) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="sets of 1 and 10 samples"):
        frechet_distance(moments(few[:1]), moments(few))


def test_kernel_distance_of_whole_sets_equals_torchmetrics(sets):
    first, second = sets[0][:300], sets[1]
    reference = KernelInceptionDistance(feature=HandedThrough(), subsets=1, subset_size=300)
    reference.update(first, real=True)
    reference.update(second, real=False)
    assert kernel_distance(first, second, seed=0) == pytest.approx(reference.compute()[0].item(), rel=1e-6)


def test_kernel_distance_over_subsets_is_torchmetrics_mean_over_the_same_ones(sets):
    draws = np.random.default_rng(4)
    values = []
    for _ in range(8):
        first, second = (features[draws.permutation(len(features))[:100]] for features in sets)
        values.append(poly_mmd(first, second).item())
    found = kernel_distance(*sets, seed=4, subsets=8, subset_size=100)
    assert found == pytest.approx(np.mean(values), rel=1e-6)
    assert found == kernel_distance(*sets, seed=4, subsets=8, subset_size=100)
    assert found != kernel_distance(*sets, seed=5, subsets=8, subset_size=100)


def test_kernel_distance_is_unbiased():
    """Two halves of one distribution: the mean over many splits is zero, unlike a biased estimate's."""
    values = [discrepancy(*normal(2, 40, 3, seed=seed)) for seed in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_neighbour_shares_are_their_definitions():
    """Against loops over every pair of points, in numpy."""
    real, made, k = normal(60, 3).numpy(), normal(50, 3, seed=1).numpy() * 0.7 + 0.4, 4

    def radii(points):
        return np.array([np.sort(np.linalg.norm(points - each, axis=1))[k] for each in points])

    near = np.array([[np.linalg.norm(r - m) for m in made] for r in real])
    in_real, in_made = near < radii(real)[:, None], near < radii(made)
    clouds = (Cloud(torch.from_numpy(points), neighbours=k) for points in (made, real))
    assert neighbour_shares(*clouds) == {
        "precision": pytest.approx(in_real.any(0).mean()),
        "recall": pytest.approx(in_made.any(1).mean()),
        "density": pytest.approx(in_real.sum(0).mean() / k),
        "coverage": pytest.approx(in_real.any(1).mean()),
    }


def test_precision_and_recall_tell_what_is_wrong():
    """One of two modes: all that is made is real, half of what is real is missed. Elsewhere: nothing fits."""
    real = torch.cat([normal(200, 2), normal(200, 2, seed=1) + 100])
    one_mode = neighbour_shares(Cloud(normal(400, 2, seed=2)), Cloud(real))
    assert one_mode["precision"] > 0.9 and one_mode["density"] > 0.8
    assert 0.4 < one_mode["recall"] <= 0.5 and 0.4 < one_mode["coverage"] <= 0.5
    elsewhere = neighbour_shares(Cloud(normal(100, 2) + 1000), Cloud(real))
    assert set(elsewhere.values()) == {0.0}
    with pytest.raises(ValueError, match="5 samples have no 5 neighbours each; compare more"):
        Cloud(normal(5, 2))


def live_elements():
    """Return how many elements the tensors hold that are alive."""
    return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)


def test_fifty_thousand_samples_pass_without_a_matrix_of_their_features():
    """3.2 million numbers pass: moments hold some covariances at most, a judge what it says it keeps."""
    width, count, batch = 64, 50_000, 500
    pixels = Features("pixels", width, nn.Identity(), lambda pictures: pictures.flatten(1))
    meter = Meter(Judge(pixels), count)
    alone, before = Moments.empty(width), live_elements()
    peaks = []
    for start in range(0, count, batch):
        pictures = normal(batch, 1, 8, 8, seed=start).float() / 10
        if start % 5000 == 0:
            peaks.append(live_elements() - before)
        meter.update(pictures, np.arange(start, start + batch), Prompts())
        alone.update(pixels(pictures))
    peaks.append(live_elements() - before)
    kept = MOST_KEPT * width
    assert kept < max(peaks) < kept + 2 * batch * width + 4 * width**2 < count * width / 4
    seen = meter.seen(World(process_group()))
    assert seen.moments.count == alone.count == count and len(seen.points) == MOST_KEPT
    assert torch.equal(seen.moments.scatter, alone.scatter)
    del meter, seen
    assert live_elements() - before < 2 * batch * width + 4 * width**2


def test_chosen_samples_follow_no_order_of_classes():
    """Of 50,000 samples whose classes go round, 10,000 at even distances would show two classes of ten."""
    classes = np.bincount(chosen(50_000, 10_000) % 10)
    assert len(classes) == 10 and classes.min() > 900
    assert (chosen(7, 9) == np.arange(7)).all() and (np.diff(chosen(100, 30)) > 0).all()
    for total in (2, 3, 50):
        others = partners(total)
        assert sorted(others) == list(range(total)) and (others != np.arange(total)).all()


SINGLE = {"frechet": 2.0, "kernel": 0.02, "precision": 0.9, "recall": 0.1, "density": 1.2, "coverage": 0.5}
MANY = {"frechet": 0.5, "kernel": 0.001, "precision": 0.9, "recall": 0.8, "density": 0.9, "coverage": 0.9}
CHANCE = {"frechet": 0.4, "kernel": -0.0001}


def test_a_metric_that_takes_one_step_for_many_is_blind():
    """Precision stays and density rises, as blurred pictures lie in the middle; the others fall."""
    assert blind_metrics(SINGLE, MANY, chance=CHANCE, num_samples=1000) == ["precision", "density"]


@pytest.mark.parametrize(
    ("single", "many", "chance", "num_samples", "blind"),
    [
        ({"frechet": 1.0}, {"frechet": 0.51}, {}, 1000, True),  # not even twice
        ({"frechet": 1.0}, {"frechet": 0.5}, {"frechet": 0.4}, 1000, False),
        ({"frechet": 1.0}, {"frechet": 0.5}, {"frechet": 0.6}, 1000, True),  # nor twice what chance gives
        ({"kernel": 1e-5}, {"kernel": -1e-4}, {"kernel": -1e-4}, 1000, True),
        ({"recall": 0.5}, {"recall": 0.6}, {}, 1000, False),
        ({"recall": 0.5}, {"recall": 0.6}, {}, 100, True),  # within three standard errors
        ({"recall": 0.91}, {"recall": 1.0}, {}, 10**6, True),  # less than a tenth
        ({"class_accuracy": 0.97}, {"class_accuracy": 0.89}, {}, 1000, True),  # the wrong way
    ],
)
def test_where_a_metric_begins_to_see(single, many, chance, num_samples, blind):
    assert bool(blind_metrics(single, many, chance=chance, num_samples=num_samples)) == blind


@pytest.mark.parametrize(
    ("own", "shuffled", "error", "blind"),
    [(0.2, 0.2, 0.001, False), (0.295, 0.2, 0.001, True), (0.2, 0.2, 0.03, True)],
)
def test_alignment_is_judged_by_what_it_is_above_shuffled_captions(own, shuffled, error, blind):
    names = ("caption_alignment", "caption_alignment_shuffled", "caption_gain_error")
    single, many = (
        dict(zip(names, values, strict=True)) for values in ((own, shuffled, error), (0.3, 0.2, error))
    )
    assert bool(blind_metrics(single, many, chance={}, num_samples=1000)) == blind
