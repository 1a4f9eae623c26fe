"""A student that copies a velocity network is that network on the diagonal, to the last bit, and stays one.

Besides: networks have right derivatives, are called block by block, and survive saving.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftmap.models.backbones.dit import DiT
from driftmap.models.backbones.mlp import MLP
from driftmap.models.backbones.unet import UNet
from driftmap.models.condition import Condition, Text, silenced, take
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import expand
from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.seeds import Random
from driftmap.trainer.tangent import time_derivative

SMALL: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}
SMALL |= {"head_width": 8, "norm_num_groups": 4}
NETWORKS: dict[str, Callable[[], Any]] = {
    "dit": lambda: DiT(sample_size=4, in_channels=3, width=16, depth=2, num_heads=2, num_classes=3),
    "dit, qk norm": lambda: DiT(
        sample_size=4, in_channels=3, width=16, depth=2, num_heads=2, num_classes=3, qk_norm=True
    ),
    "dit, captions": lambda: DiT(
        sample_size=4, in_channels=3, width=16, depth=2, num_heads=2, qk_norm=True, text_width=5, max_tokens=4
    ),
    "mlp": lambda: MLP(channels=3, width=16, depth=2, num_classes=3),
    "unet": lambda: UNet(**SMALL, num_classes=3),
    "unet, captions": lambda: UNet(**SMALL, text_width=5, max_tokens=4),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_dit = pytest.mark.parametrize("name", ["dit", "dit, qk norm", "dit, captions"])
every_one_with_a_gap = pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mlp"])
RANDOM = Random(0, torch.arange(6))
S, T = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1]), torch.tensor([0.0, 0.4, 0.7, 0.1, 0.2, 0.0])
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
LENGTHS = torch.tensor([4, 3, 1, 0, 2, 4])
TEXT = Text(RANDOM.normal("text", (4, 5)), torch.arange(4) < LENGTHS[:, None])


def network(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]()


def moved(name: str) -> Any:
    """Return a network none of whose weights is at its start: zeros would hide mistakes."""
    found = network(name)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return found


def given(name: str) -> Condition:
    """Return conditions of the kind that a network takes; the fourth one says nothing."""
    return TEXT if name.endswith("captions") else LABELS


def state(found: nn.Module) -> Tensor:
    return RANDOM.normal("x", found.sample_shape)


def trained(found: Any, objective: Any, *, steps: int = 5) -> Any:
    """Return the network after some steps of an objective on random data."""
    optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        random = Random(1, torch.arange(8 * step, 8 * step + 8))
        captions = Text(random.normal("text", (4, 5)), torch.ones(8, 4, dtype=torch.bool))
        condition = captions if FlowMap(found).text_width else random.index % 3
        batch = Batch(random.normal("data", found.sample_shape), condition, random)
        objective(FlowMap(found), batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@every_network
def test_a_student_with_its_teachers_weights_equals_it_on_the_diagonal(name: str) -> None:
    teacher, student = moved(name), network(name)
    student.load_state_dict(teacher.state_dict())
    x = state(teacher)
    assert torch.equal(FlowMap(student).velocity(x, S, given(name)), teacher(x, S, S, given(name)))


@every_one_with_a_gap
def test_a_student_at_birth_equals_its_teacher_whatever_the_target_time(name: str) -> None:
    """Flow matching, weight decay included, never moves the last layer of the gap's embedding from zero."""
    teacher = trained(network(name), FlowMatching())
    x = state(teacher)
    assert torch.equal(teacher(x, S, T, given(name)), teacher(x, S, S, given(name)))
    assert teacher(x, S, S, given(name)).abs().max() > 0


def gap_of(found: Any) -> list[nn.Linear]:
    """Return the layers that embed the gap, the last one last."""
    return [found.embed.times.cond_proj] if isinstance(found, UNet) else list(found.embed.gap.children())


@every_one_with_a_gap
def test_whatever_is_trained_the_diagonal_does_not_see_the_gap_embedding(name: str) -> None:
    student = trained(network(name), Lagrangian())
    other = copy.deepcopy(student)
    for layer in gap_of(other):
        nn.init.normal_(layer.weight)
    x = state(student)
    assert torch.equal(student(x, S, S, given(name)), other(x, S, S, given(name)))
    assert gap_of(student)[-1].weight.abs().max() > 0
    assert not torch.equal(student(x, S, T, given(name)), student(x, S, S, given(name)))


@pytest.mark.parametrize("along", ["x", "s", "t"])
@every_network
def test_the_forward_mode_derivative_and_its_gradient_are_those_of_a_central_difference(
    name: str, along: str
) -> None:
    """Also the gradient: that of torch's own layer norm is wrong through its forward-mode derivative."""
    found = moved(name).double()
    x, s, t = state(found).double(), S.double(), T.double()
    dx, ds, dt = {"x": (x.flip(0), 0, 0), "s": (0 * x, 0.1, 0), "t": (0 * x, 0, 1)}[along]

    def mean_velocity(by: Tensor) -> Tensor:
        return found(x + expand(by, x) * dx, s + by * ds, t + by * dt, given(name))

    parts = []
    for how in ("forward", "finite_difference"):
        value, slope = time_derivative(mean_velocity, torch.zeros_like(t), how=how)
        gradients = torch.autograd.grad((value * slope).sum(), list(found.parameters()), allow_unused=True)
        parts.append([value, slope, *(g for g in gradients if g is not None)])
    for one, other in zip(*parts, strict=True):
        # step^2 / 6 times frequencies of 100, squared; the bias of keys has no gradient but rounding
        assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-5)
    assert parts[0][1].abs().max() > 1e-2


@every_network
def test_a_batch_may_be_empty(name: str) -> None:
    """Of the few samples of a process none may be a jump, and a strategy wants every process to call."""
    found = moved(name)
    x = state(found)
    empty = found(x[:0], S[:0], T[:0], take(given(name), slice(0)))
    assert empty.shape == (0, *x.shape[1:])
    empty.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in found.parameters() if p.dim() > 1)


@every_dit
def test_blocks_called_one_by_one_are_the_forward(name: str) -> None:
    found = moved(name)
    x = state(found)
    *caption, mean = found.caption(*TEXT) if name == "dit, captions" else [0.0]
    tokens, c = found.embed(x, S, T, None if caption else LABELS)
    for block in found.blocks:
        tokens = block(tokens, c + mean, *caption)
    assert torch.equal(found.unpatch(found.head(tokens, c + mean)), found(x, S, T, given(name)))


def test_patches_go_back_to_where_they_were_taken() -> None:
    """With unit embedding weights the tokens are the patches; position (1, 2) of channel 1 is traced."""
    found = DiT(sample_size=4, in_channels=3, patch_size=2, width=12, depth=1, num_heads=1)
    nn.init.eye_(found.embed.patches.weight)
    x = state(found)
    tokens, _ = found.embed(x, S, T, None)
    assert torch.equal(found.unpatch(tokens - found.embed.positions).round(decimals=5), x.round(decimals=5))
    lone = torch.zeros(1, 3, 4, 4)
    lone[0, 1, 1, 2] = 1
    tokens, _ = found.embed(lone, S[:1], T[:1], None)
    assert (tokens - found.embed.positions).abs().sum(
        2
    ).argmax() == 1  # row 1, column 2 is in the second patch


@every_network
def test_a_missing_condition_says_nothing(name: str) -> None:
    found = moved(name)
    x, nothing = state(found), FlowMap(found).null_condition
    null = silenced(given(name), torch.ones(6, dtype=torch.bool), nothing=nothing)
    torch.testing.assert_close(found(x, S, T), found(x, S, T, null), rtol=1e-5, atol=1e-6)
    assert (found(x, S, T)[:3] - found(x, S, T, given(name))[:3]).abs().amax(
        tuple(range(1, x.dim()))
    ).min() > 1e-4


@every_network
def test_each_sample_is_computed_on_its_own(name: str) -> None:
    found = moved(name)
    x = state(found)
    rows = [slice(i, i + 1) for i in range(6)]
    alone = torch.cat([found(x[row], S[row], T[row], take(given(name), row)) for row in rows])
    torch.testing.assert_close(found(x, S, T, given(name)), alone, rtol=1e-4, atol=1e-5)


@every_dit
def test_a_saved_transformer_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    found = moved(name)
    found.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert isinstance(loaded, DiT)
    settings = {key for key in found.config if not key.startswith("_")}
    assert {key: loaded.config[key] for key in settings} == {key: found.config[key] for key in settings}
    x = state(found)
    assert torch.equal(loaded(x, S, T, given(name)), found(x, S, T, given(name)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sample_size": 7}, "sample_size 7 is no multiple of patch_size 2"),
        ({"width": 18, "num_heads": 2}, "width 18 must be a multiple of 4 and of num_heads 2"),
        ({"width": 16, "num_heads": 3}, "width 16 must be a multiple of 4 and of num_heads 3"),
        ({"num_classes": 2, "text_width": 3}, "a sample has a class or a caption; set one of them to 0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**settings)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 4), (3, 2, 8)])
def test_samples_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    """The last one holds as many numbers as a right sample: reshaping alone would take it."""
    with pytest.raises(ValueError, match=r"x has shape \(6, .*\), expected \(6, 3, 4, 4\)"):
        network("dit")(torch.zeros(6, *shape), S, T, LABELS)


def test_an_unknown_class_is_refused() -> None:
    for name in NETWORKS.keys() - {"dit, captions", "unet, captions"}:
        found = network(name)
        with pytest.raises(IndexError):
            found(state(found), S, T, LABELS + 1)


# Captions


@pytest.mark.parametrize("name", ["dit, captions", "unet, captions"])
def test_padding_and_its_length_do_not_matter(name: str) -> None:
    found, x = moved(name), state(network(name))
    noise = torch.where(TEXT.mask[..., None], TEXT.tokens, 1e3 * torch.randn(6, 4, 5))
    assert torch.equal(found(x, S, T, Text(noise, TEXT.mask)), found(x, S, T, TEXT))
    short = found(x[2:3], S[2:3], T[2:3], Text(TEXT.tokens[2:3, :1], TEXT.mask[2:3, :1]))
    torch.testing.assert_close(short, found(x, S, T, TEXT)[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["reading", "mean"])
def test_blocks_read_the_tokens_and_the_modulation_their_mean(part: str) -> None:
    """Each way alone lets a caption through; at birth, with both at zero, the output ignores it."""
    found, other = moved("dit, captions"), Text(TEXT.tokens.flip(1), TEXT.mask)
    x = state(found)
    for name, parameter in found.named_parameters():
        if name in ("caption.mean.weight", "blocks.0.reading.projection.weight") and part not in name:
            nn.init.zeros_(parameter)
    nn.init.zeros_(found.blocks[1].reading.projection.weight)
    assert (found(x, S, T, TEXT) - found(x, S, T, other))[1].abs().max() > 1e-4
    nn.init.zeros_(found.caption.mean.weight)
    nn.init.zeros_(found.blocks[0].reading.projection.weight)
    assert torch.equal(found(x, S, T, TEXT), found(x, S, T, other))


def test_text_on_top_of_a_network_without_changes_nothing_at_birth() -> None:
    """So a text-less checkpoint can be given captions."""
    plain = DiT(sample_size=4, in_channels=3, width=16, depth=2, num_heads=2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = DiT(sample_size=4, in_channels=3, width=16, depth=2, num_heads=2, text_width=5, max_tokens=4)
    assert not found.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = state(plain)
    assert torch.equal(found(x, S, T, TEXT), plain(x, S, T))


@pytest.mark.parametrize(
    "condition, message",
    [
        (LABELS, "takes captions of text_width 5, not class labels"),
        (Text(torch.zeros(6, 5, 5), torch.zeros(6, 5).bool()), "5 tokens of width 5, expected at most 4 of"),
        (Text(torch.zeros(6, 4, 3), torch.zeros(6, 4).bool()), "4 tokens of width 3, expected at most 4 of"),
    ],
)
def test_other_conditions_than_its_captions_are_refused(condition: Condition, message: str) -> None:
    found = network("dit, captions")
    with pytest.raises(ValueError, match=message):
        found(state(found), S, T, condition)
    with pytest.raises(ValueError, match=r"takes no captions \(text_width is 0\)"):
        network("dit")(state(found), S, T, TEXT)
