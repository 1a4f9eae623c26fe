"""Randomness is a function of (seed, position, purpose): right bits, right distributions, no memory."""

import math

import pytest
import torch
from torch import Tensor

from driftmap.trainer.seeds import Random, threefry

MANY = 100_000
UNIFORMS = Random(0, torch.arange(MANY)).uniform("time")
NORMALS = Random(0, torch.arange(MANY // 8)).normal("noise", (8,))


def words(*values: int) -> tuple[Tensor, Tensor]:
    """Return two words."""
    return torch.tensor(values[0]).to(torch.int32), torch.tensor(values[1]).to(torch.int32)


@pytest.mark.parametrize(
    "key, counter, expected",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_its_authors_known_answers(key, counter, expected) -> None:
    """Source: the file kat_vectors of Random123, threefry 2x32 with 20 rounds."""
    found = threefry(words(*key), words(*counter))
    assert (found[0].item() & 0xFFFFFFFF, found[1].item() & 0xFFFFFFFF) == expected


def test_the_streams_of_released_versions_do_not_change() -> None:
    """A change here changes every run; the numbers are from an independent implementation."""
    random = Random(7, torch.tensor([0, 1, 2**32, 5 * 2**32 + 1]))
    cells = (random.uniform("time").double() * 2**23 - 0.5).long()
    assert cells.tolist() == [5361604, 999237, 3401929, 858363]
    normals = [[0.53567673, -2.99375158, 0.66317004], [0.11081593, 1.55492527, 1.89507489]]
    torch.testing.assert_close(random.normal("noise", (3,))[:2], torch.tensor(normals))
    pair = torch.tensor([[row[0], row[2]] for row in normals])  # the cosine and the sine of one angle
    torch.testing.assert_close(random.normal("noise", (2,))[:2], pair)


def distance_to(cumulative: Tensor) -> float:
    """Return Kolmogorov and Smirnov's distance, given the claimed cumulative probability of each number."""
    ordered = cumulative.double().flatten().sort().values
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()).item()


BOUND = 1.95 / math.sqrt(MANY)  # exceeded by one of a thousand sets of as many fair numbers


def test_uniforms_are_uniform_and_never_zero_or_one() -> None:
    assert distance_to(UNIFORMS) < BOUND
    assert 0 < UNIFORMS.min() and UNIFORMS.max() < 1
    assert abs(UNIFORMS.mean() - 0.5) < 4 * math.sqrt(1 / 12 / MANY)


def test_normals_are_normal() -> None:
    assert distance_to(0.5 * (1 + torch.erf(NORMALS.double() / math.sqrt(2)))) < BOUND
    moments = [NORMALS.double().pow(power).mean().item() for power in (1, 2, 3, 4)]
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(found - expected) < 4 * math.sqrt(variance / MANY)
    assert torch.isfinite(NORMALS).all() and NORMALS.abs().max() > 4


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two sets of numbers, whose chance level is 1 / sqrt(their count)."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].item()


def test_numbers_are_independent_across_purpose_seed_position_and_place() -> None:
    index = torch.arange(MANY // 8)
    others = {
        "purpose": Random(0, index).normal("posterior", (8,)),
        "seed": Random(1, index).normal("noise", (8,)),
        "next position": Random(0, index + 1).normal("noise", (8,)),
        "far position": Random(0, index + 2**32).normal("noise", (8,)),
        "place": NORMALS.roll(1, dims=1),
        "other half of a pair": NORMALS.roll(4, dims=1),
    }
    for name, other in others.items():
        for one, two in ((NORMALS, other), (NORMALS**2, other**2)):  # squares: the radius is shared otherwise
            assert abs(correlation(one, two)) < 4.5 / math.sqrt(MANY), name


def test_a_sample_has_the_same_numbers_in_every_batch_and_order() -> None:
    index = torch.arange(1000, 1048)
    whole = Random(5, index).normal("noise", (3, 2))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Random(5, index[order]).normal("noise", (3, 2)), whole[order])
    parts = [Random(5, part).normal("noise", (3, 2)) for part in index.split([1, 30, 17])]
    assert torch.equal(torch.cat(parts), whole)


def test_asking_twice_or_for_something_else_between_changes_nothing() -> None:
    random = Random(5, torch.arange(8))
    first = random.uniform("time")
    random.normal("noise", (4,))
    torch.manual_seed(99)
    assert torch.equal(random.uniform("time"), first)


def test_positions_beyond_32_bits_have_numbers_of_their_own() -> None:
    near, far = torch.arange(100), torch.arange(100) + 3 * 2**32
    first, second = Random(0, near).uniform("time"), Random(0, far).uniform("time")
    assert not (first == second).any()
    assert len(torch.cat([first, second]).unique()) > 195


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (4, 8, 8)])
def test_normals_have_the_shape_asked_for(shape: tuple[int, ...]) -> None:
    assert Random(0, torch.arange(3)).normal("noise", shape).shape == (3, *shape)
