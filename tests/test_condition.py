"""Classes and captions are dropped, guided and published alike; one that says nothing has a meaning, too."""

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler

from driftmap.models.backbones.dit import DiT
from driftmap.models.condition import Text, joined, no_text, padded, silenced, take
from driftmap.models.denoiser import Guided, InBf16
from driftmap.models.flow_map import FlowMap
from driftmap.models.pipeline import FlowMapPipeline
from driftmap.models.samplers import jump, time_grid
from driftmap.trainer.objective import Batch
from driftmap.trainer.seeds import Random

RANDOM = Random(0, torch.arange(4))
TEXT = padded([RANDOM.normal("text", (3, 5))[i, :length] for i, length in enumerate((3, 1, 0, 2))])
LABELS = torch.tensor([0, 1, 2, 1])
EVERY = torch.ones(4, dtype=torch.bool)


def moved(**settings):
    """Return a flow map none of whose weights is at its start."""
    torch.manual_seed(0)
    found = DiT(sample_size=4, in_channels=3, width=16, depth=2, num_heads=2, **settings)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return FlowMap(found)


def of_captions():
    return moved(text_width=5, max_tokens=3)


GIVEN = {"classes": (lambda: moved(num_classes=3), LABELS), "captions": (of_captions, TEXT)}
every_kind = pytest.mark.parametrize("kind", GIVEN)
X = RANDOM.normal("x", (3, 4, 4))
S = torch.tensor([1.0, 0.8, 0.5, 0.2])


def test_captions_are_padded_and_masked():
    assert TEXT.tokens.shape == (4, 3, 5) and not TEXT.tokens[~TEXT.mask].any()
    assert TEXT.mask.tolist() == [[True] * 3, [True, False, False], [False] * 3, [True, True, False]]
    short = take(TEXT, torch.tensor([3, 1]))
    assert isinstance(short, Text) and torch.equal(short.mask, TEXT.mask[[3, 1]])


def test_only_the_rows_that_are_silenced_change():
    rows = torch.tensor([True, False, False, True])
    assert silenced(LABELS, rows, nothing=3).tolist() == [3, 1, 2, 3]
    found = silenced(TEXT, rows, nothing=no_text())
    assert isinstance(found, Text) and found.tokens.dtype == TEXT.tokens.dtype
    assert not found.mask[rows].any() and torch.equal(found.mask[~rows], TEXT.mask[~rows])
    assert torch.equal(found.tokens[~rows], TEXT.tokens[~rows])


def test_classes_and_captions_do_not_mix():
    with pytest.raises(ValueError, match="do not mix"):
        joined(TEXT, LABELS)
    with pytest.raises(ValueError, match="do not mix"):
        silenced(TEXT, EVERY, nothing=3)


@every_kind
def test_dropped_conditions_are_keyed_and_say_nothing(kind):
    make, given = GIVEN[kind]
    model, random = make(), Random(1, torch.arange(400))
    batch = Batch(torch.zeros(400, 1), take(given, torch.arange(400) % 2), random)
    dropped = batch.with_condition_dropped(0.25, null=model.null_condition).condition
    silent = dropped == 3 if kind == "classes" else ~dropped.mask.any(1)
    assert torch.equal(silent, random.uniform("condition dropout") < 0.25) and 60 < silent.sum() < 140
    rest = batch.take(~silent).condition
    assert torch.equal(*(one if kind == "classes" else one.tokens for one in (take(dropped, ~silent), rest)))


@every_kind
def test_guidance_extrapolates_from_the_network_that_is_told_nothing(kind):
    make, given = GIVEN[kind]
    model = make()
    told, untold = model.velocity(X, S, given), model.velocity(X, S, None)
    guided = Guided(model, 3.0, null_condition=model.null_condition).velocity(X, S, given)
    torch.testing.assert_close(guided, untold + 3 * (told - untold), rtol=1e-4, atol=1e-4)
    assert (told - untold).abs().max() > 1e-2


@every_kind
def test_a_teacher_in_half_precision_takes_them(kind):
    make, given = GIVEN[kind]
    model = make()
    half = InBf16(Guided(make().bfloat16(), 2.0, null_condition=model.null_condition))
    expected = Guided(model, 2.0, null_condition=model.null_condition).velocity(X, S, given)
    assert (half.velocity(X, S, given) - expected).norm() < 0.05 * expected.norm()


@every_kind
def test_the_pipeline_gives_what_the_sampler_gives(kind):
    make, given = GIVEN[kind]
    model = make()
    pipe = FlowMapPipeline(FlowMapEulerDiscreteScheduler(), transformer=model.backbone)
    pipe.set_progress_bar_config(disable=True)
    told = (
        {"class_labels": LABELS.tolist()}
        if kind == "classes"
        else {"prompt_embeds": TEXT.tokens, "prompt_mask": TEXT.mask}
    )
    found = pipe(**told, latents=X, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(found, jump(model, X, grid=time_grid(2), condition=given))


def test_what_the_pipeline_cannot_take_is_said():
    pipe = FlowMapPipeline(FlowMapEulerDiscreteScheduler(), transformer=of_captions().backbone)
    for told, message in (
        ({"prompt_mask": TEXT.mask}, "prompt_mask is of prompt_embeds"),
        ({"prompt_embeds": TEXT.tokens, "class_labels": [1]}, "not both"),
        (
            {"prompt_embeds": TEXT.tokens, "prompt_mask": TEXT.mask[:2]},
            r"expected \(B, L, width\) and \(B, L\)",
        ),
        ({"class_labels": [1]}, "takes captions of text_width 5, not class labels"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**told)
