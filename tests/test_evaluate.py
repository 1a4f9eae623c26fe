"""A table compares what can be compared: the same noise, and evaluations at what they cost."""

import numpy as np
import pytest
import torch

from driftmap.models.denoiser import Denoiser, Guided
from driftmap.models.flow_map import FlowMap
from driftmap.models.samplers import jump
from driftmap.models.schedule import LinearBetas
from driftmap.trainer.evaluate import noise_of, sample_noise, samplers
from driftmap.trainer.features import CaptionJudge, Features
from driftmap.trainer.judge import Judge, Meter, Prompts
from driftmap.trainer.strategy import process_group
from driftmap.trainer.world import World
from oracle import Blind, GaussianBackbone


def test_a_guided_teacher_is_charged_two_evaluations_a_step():
    model = FlowMap(GaussianBackbone())
    guided = Guided(model, 2.0, null_condition=0)
    plain = [(name, nfe) for name, _, nfe, _ in samplers(model, model, [1, 2, 4], 16)]
    charged = [(name, nfe) for name, _, nfe, _ in samplers(guided, model, [1, 2, 4], 16)]
    assert plain == [("teacher", 16)] + [(name, nfe) for name in ("teacher", "student") for nfe in (1, 2, 4)]
    assert ("teacher", 1) not in charged and ("teacher", 2) in charged and ("student", 1) in charged


def test_the_single_step_of_the_teacher_is_always_there():
    model = FlowMap(GaussianBackbone())
    for teacher, single in ((model, 1), (Guided(model, 2.0, null_condition=0), 2)):
        rows = [(name, nfe) for name, _, nfe, _ in samplers(teacher, model, [4, 8], 16)]
        assert rows == [("teacher", nfe) for nfe in (16, single, 4, 8)] + [("student", 4), ("student", 8)]


def test_a_run_without_jumps_is_only_a_teacher():
    model = FlowMap(GaussianBackbone())
    rows = [(name, nfe) for name, _, nfe, _ in samplers(model, model, [1, 4], 16, jumps=False)]
    assert rows == [("teacher", 16), ("teacher", 1), ("teacher", 4)]


def test_the_shift_moves_the_times_of_the_student_alone():
    model, noise = FlowMap(Blind()), sample_noise(4, (5,), seed=0).double()
    rows, even = (
        {row[:3]: row[3] for row in samplers(model, model, [2], 4, shift=shift)} for shift in (1.5, 1)
    )
    expected = jump(model, noise, grid=torch.tensor([1, 0.6, 0], dtype=torch.float64))
    torch.testing.assert_close(rows["student", "jump", 2](noise, None), expected)
    assert not torch.equal(even["student", "jump", 2](noise, None), expected)
    assert torch.equal(rows["teacher", "euler", 2](noise, None), even["teacher", "euler", 2](noise, None))


def test_a_denoiser_is_never_asked_at_time_0_where_ddpm_trains_none():
    asked = []

    class Backbone(GaussianBackbone):
        def forward(self, x, s, t, condition=None):
            asked.append(s.min().item())
            return torch.zeros_like(x)

    model = Denoiser(Backbone(), LinearBetas(num_steps=100), prediction="noise")
    rows = list(samplers(model, model, [1, 4], 16))
    assert [row[:3] for row in rows[:2]] == [("teacher", "dpm_solver", 16), ("teacher", "ddim", 1)]
    for _, _, nfe, sample in rows:
        asked.clear()
        sample(torch.ones(2, *model.sample_shape), None)
        assert len(asked) == nfe and min(asked) > 0


def test_sample_i_is_the_same_in_any_set():
    assert torch.equal(sample_noise(3, (2, 4), seed=7), sample_noise(9, (2, 4), seed=7)[:3])
    assert not torch.equal(sample_noise(3, (2, 4), seed=7), sample_noise(3, (2, 4), seed=8))
    assert torch.equal(
        noise_of(torch.tensor([5, 2]), (2, 4), seed=7), sample_noise(9, (2, 4), seed=7)[[5, 2]]
    )


def test_alignment_is_with_the_own_caption_and_beside_it_with_another():
    """Pictures whose features are one-hot, captions of the same space: 1 for the right one, 0 for another."""
    space = Features("one of four", 4, torch.nn.Identity(), lambda pictures: pictures.flatten(1) + 1)
    judge = Judge(space, captions=CaptionJudge(space, tokenizer=None))
    kinds = torch.tensor([0, 1, 2, 3, 0, 1])
    pictures = (2 * torch.nn.functional.one_hot(kinds, 4) - 1).float().reshape(6, 1, 2, 2)
    texts = torch.nn.functional.one_hot(kinds, 4).float()
    meter = Meter(judge, 6)
    meter.update(pictures, np.arange(6), Prompts(captions=texts, shuffled=texts.roll(1, dims=1)))
    answers = meter.seen(World(process_group())).answers
    assert answers == {
        "caption_alignment": pytest.approx(1),
        "caption_alignment_shuffled": pytest.approx(0),
        "caption_gain_error": pytest.approx(0, abs=1e-6),
    }
