"""Distances between sets of features are the ones of the literature, and see what they must."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from driftmap.models.denoiser import Guided
from driftmap.models.flow_map import FlowMap
from driftmap.trainer.evaluate import frechet_distance, kernel_distance, sample_noise, samplers
from oracle import GaussianBackbone


class Features(torch.nn.Module):
    """Hands features through, so that a metric of pictures becomes one of features."""

    num_features = 6

    def forward(self, features):
        """Return what is given."""
        return features


@pytest.fixture
def sets():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6))
    second = generator.normal(size=(300, 6)) @ generator.normal(size=(6, 6)) + 0.5
    return first, second


def test_frechet_distance_equals_torchmetrics(sets):
    first, second = sets
    reference = FrechetInceptionDistance(feature=Features(), input_img_size=(6,)).set_dtype(torch.float64)
    reference.update(torch.from_numpy(first), real=True)
    reference.update(torch.from_numpy(second), real=False)
    assert frechet_distance(first, second) == pytest.approx(reference.compute().item(), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Two sets that differ by a shift alone: the distance is the shift squared."""
    points = np.random.default_rng(1).normal(size=(500, 4))
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(points, points + [3, 0, 0, 4]) == pytest.approx(25)


def test_kernel_distance_equals_torchmetrics(sets):
    first, second = sets[0][:300], sets[1]
    reference = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=300)
    reference.update(torch.from_numpy(first), real=True)
    reference.update(torch.from_numpy(second), real=False)
    assert kernel_distance(first, second) == pytest.approx(reference.compute()[0].item(), rel=1e-6)


def test_kernel_distance_is_unbiased():
    """Two halves of one distribution: the mean over many splits is zero, unlike a biased estimate's."""
    generator = np.random.default_rng(2)
    values = [kernel_distance(*generator.normal(size=(2, 40, 3))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_a_guided_teacher_is_charged_two_evaluations_a_step():
    model = FlowMap(GaussianBackbone())
    guided = Guided(model, 2.0, null_condition=0)
    plain = [(name, nfe) for name, _, nfe, _ in samplers(model, model, [1, 2, 4], 16)]
    charged = [(name, nfe) for name, _, nfe, _ in samplers(guided, model, [1, 2, 4], 16)]
    assert plain == [("teacher", 16)] + [(name, nfe) for name in ("teacher", "student") for nfe in (1, 2, 4)]
    assert ("teacher", 1) not in charged and ("teacher", 2) in charged and ("student", 1) in charged


def test_sample_i_is_the_same_in_any_set():
    assert torch.equal(sample_noise(3, (2, 4), seed=7), sample_noise(9, (2, 4), seed=7)[:3])
    assert not torch.equal(sample_noise(3, (2, 4), seed=7), sample_noise(3, (2, 4), seed=8))
