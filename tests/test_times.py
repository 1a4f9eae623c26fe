"""Pairs of times have the distributions that their settings say, and each is a function of its position.

Closed forms by Kolmogorov and Smirnov's test: F of the sources, G of the targets; of two sorted draws the
later one has F G, the earlier one 1 - (1 - F) (1 - G).
"""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from torch import Tensor

from driftmap.data.plan import rank_positions
from driftmap.trainer.objective import Batch
from driftmap.trainer.seeds import Random
from driftmap.trainer.times import LogitNormal, Pairs, Times, Uniform

COUNT = 20_000
RANDOM = Random(0, torch.arange(COUNT))
START = torch.zeros(COUNT).double()
NOISY, CLEAN = LogitNormal("logit_normal", 0.4), LogitNormal("logit_normal", -1.2, 1.5)
EVERY_TIME = [Uniform(), Uniform(shift=3.0), NOISY, CLEAN, LogitNormal("logit_normal", -0.6, 1.6, 2.0)]


def sampled(step: Tensor = START, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    s, t = Pairs(**settings).sample(RANDOM, step)
    return s.double().numpy(), t.double().numpy()


def jumps_of(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    return sampled(diagonal=0, **settings)


def below(times: Any, t: np.ndarray) -> np.ndarray:
    """Return the distribution function by scipy's normal one, not ours."""
    odds = np.log(t / (1 - t)) - np.log(times.shift)
    return 1 / (1 + np.exp(-odds)) if times.name == "uniform" else stats.norm.cdf(odds, times.mean, times.std)


def is_uniform(values: np.ndarray) -> bool:
    """Return whether the values of a distribution function at draws of it are uniform, as they should."""
    return stats.kstest(values, "uniform").pvalue > 1e-3


def share(chosen: Any, expected: Any) -> bool:
    return abs(np.mean(chosen) - expected) < 4 * np.sqrt(expected * (1 - expected) / np.size(chosen))


@pytest.mark.parametrize("times", EVERY_TIME, ids=str)
def test_times_are_distributed_as_they_say(times: Any) -> None:
    drawn = times.sample(RANDOM).double()
    assert is_uniform(below(times, drawn.numpy()))
    torch.testing.assert_close(times.share_below(drawn), torch.tensor(below(times, drawn.numpy())))
    torch.testing.assert_close(times.quantile(times.share_below(drawn)), drawn)


@pytest.mark.parametrize("source, target", [(Uniform(), Uniform()), (NOISY, CLEAN), (CLEAN, NOISY)], ids=str)
def test_sorted_pairs_are_the_later_and_the_earlier_of_two_draws(source: Any, target: Any) -> None:
    s, t = jumps_of(source=source, target=target)
    assert (t < s).all()
    assert is_uniform(below(source, s) * below(target, s))
    assert is_uniform((1 - below(source, t)) * (1 - below(target, t)))


def test_the_gaps_of_sorted_draws_of_one_density_are_oftenest_short() -> None:
    """So no rule amplifies errors on their way from the diagonal; uniform ones fill the triangle evenly."""
    s, t = jumps_of()
    assert is_uniform((1 - (s - t)) ** 2)
    for times in EVERY_TIME:
        for step in (0.0, 49.0, 1000.0):
            s, t = sampled(START + step, diagonal=0, times=times, widen_steps=100)
            counts, _ = np.histogram(s - t, bins=8, range=(0, min(1, (step + 1) / 100)))
            assert counts[0] >= counts.max() - 4 * np.sqrt(counts.max())


def test_a_clamped_target_after_its_source_makes_a_diagonal_sample() -> None:
    s, t = jumps_of(source=CLEAN, target=NOISY, order="clamped")
    unclamped = NOISY.sample(RANDOM, "target time").double().numpy()
    assert is_uniform(below(CLEAN, s))
    assert np.array_equal(t, np.minimum(s, unclamped))
    # logit(target) - logit(source) is N(1.6, 1^2 + 1.5^2), and where it is above 0 the target is after it.
    assert share(t == s, stats.norm.sf(0, 1.6, np.sqrt(3.25)))


@pytest.mark.parametrize("gap, target", [(NOISY, CLEAN), (Uniform(), NOISY), (CLEAN, None)], ids=str)
def test_a_gap_drawn_first_has_its_distribution_and_its_target_the_one_of_what_is_left(gap: Any, target: Any):
    s, t = jumps_of(gap=gap, target=target)
    assert (0 <= t).all() and (t < s).all() and (s <= 1).all()
    assert is_uniform(below(gap, s - t))
    shorter = s - t < 0.999  # of the others 1 - gap is no more than its rounding
    s, t, target = s[shorter], t[shorter], target or Uniform()
    assert is_uniform(below(target, t) / below(target, 1 - (s - t)))


def test_gaps_drawn_first_are_kept_from_noise_and_to_the_data() -> None:
    s, t = jumps_of(gap=CLEAN, from_noise=0.3, to_data=0.3)
    whole = (s == 1) & (t == 0)
    assert share(whole, 0.09) and share(s == 1, 0.3) and share(t == 0, 0.3)
    assert is_uniform(below(CLEAN, (s - t)[~whole]))
    assert is_uniform(below(CLEAN, (1 - t)[(s == 1) & ~whole]))


@pytest.mark.parametrize("roles", ["drawn", "fixed"])
def test_roles_have_the_shares_asked_for_independently(roles: Any) -> None:
    step = torch.arange(COUNT).double() / 100
    s, t = sampled(step, diagonal=0.3, from_noise=0.2, to_data=0.1, inverse=0.4, roles=roles)
    diagonal, jump, inverse = s == t, s != t, t > s
    later, earlier = np.maximum(s, t), np.minimum(s, t)
    assert share(diagonal, 0.3)
    assert share(later[jump] == 1, 0.2) and share(earlier[jump] == 0, 0.1) and share(inverse[jump], 0.4)
    assert share((later == 1)[inverse], 0.2) and share((earlier == 0)[later == 1], 0.1)
    assert is_uniform(s[diagonal]), "the diagonal is not sorted"
    free = jump & (later < 1) & (earlier > 0)
    assert is_uniform(later[free] ** 2) and is_uniform((1 - earlier[free]) ** 2)


def test_inverse_pairs_are_the_others_turned_round() -> None:
    s, t = jumps_of(from_noise=0.5)
    target, source = jumps_of(from_noise=0.5, inverse=1)
    assert np.array_equal(s, source) and np.array_equal(t, target)


@pytest.mark.parametrize("settings", [{}, {"gap": CLEAN, "inverse": 0.5}, {"from_noise": 1, "to_data": 1}])
def test_all_times_keep_the_limits(settings: Any) -> None:
    limits = (0.028, 0.93596)
    for inside, free in zip(sampled(limits=limits, **settings), sampled(**settings), strict=True):
        np.testing.assert_allclose(inside, limits[0] + (limits[1] - limits[0]) * free, atol=1e-6)


def test_gaps_widen_linearly_from_the_source_on_and_to_the_data_from_there_on() -> None:
    settings: Any = {"diagonal": 0.2, "from_noise": 0.3, "to_data": 0.3, "inverse": 0.2}
    s, t = sampled(**settings)
    kept = np.where((np.minimum(s, t) == 0) & (np.maximum(s, t) < 1), np.minimum(s, t), np.maximum(s, t))
    for step, factor in ((0.0, 0.1), (0.9, 0.1), (4.5, 0.5), (9.0, 1.0), (1e6, 1.0)):
        early_s, early_t = sampled(START + step, widen_steps=10, **settings)
        np.testing.assert_allclose(early_t - early_s, factor * (t - s), atol=1e-6)
        jump = s != t
        end = np.where(np.abs(early_s - kept) < np.abs(early_t - kept), early_s, early_t)
        np.testing.assert_allclose(end[jump], kept[jump], atol=1e-6)
        assert 0.95 * factor < np.abs(early_t - early_s).max() <= factor + 1e-6
    mixed = torch.where(torch.arange(COUNT) % 2 == 0, 0.0, 20.0).double()
    early_s, early_t = sampled(mixed, widen_steps=10, **settings)
    np.testing.assert_allclose((early_t - early_s)[1::2], (t - s)[1::2], atol=1e-6)
    np.testing.assert_allclose((early_t - early_s)[::2], 0.1 * (t - s)[::2], atol=1e-6)


EVERYTHING = Pairs(
    times=NOISY,
    diagonal=0.25,
    from_noise=0.25,
    to_data=0.5,
    inverse=0.25,
    source=NOISY,
    target=CLEAN,
    widen_steps=9,
    limits=(0.1, 0.9),
    roles="fixed",
)


def batch_at(positions: Any, batch_size: int) -> Batch:
    index = torch.as_tensor(positions)
    return Batch(torch.zeros(len(index), 1), None, Random(5, index), batch_size=batch_size)


def test_a_pair_is_a_function_of_its_position_alone() -> None:
    whole = batch_at(np.arange(1280), 128)
    s, t = EVERYTHING.sample(whole.random, whole.step)
    for world in (1, 2, 8):
        for rank in range(world):
            positions = rank_positions(256, 128, rank=rank, world=world)
            part = batch_at(positions, 128)
            own_s, own_t = EVERYTHING.sample(part.random, part.step)
            assert torch.equal(own_s == own_t, (s == t)[positions])
            torch.testing.assert_close((own_s, own_t), (s[positions], t[positions]), rtol=1e-6, atol=1e-6)


def test_pairs_of_earlier_versions_are_drawn_again() -> None:
    """A run that goes on has to see the same pairs: these were drawn when `Pairs` had its first settings."""
    s, t = Pairs().sample(Random(0, torch.arange(4)), torch.zeros(4).double())
    assert s.tolist() == [0.5694745182991028, 0.4317334294319153, 0.527961790561676, 0.19687074422836304]
    assert t.tolist() == [0.5694745182991028, 0.2937031388282776, 0.527961790561676, 0.18206673860549927]


def of_processes(pairs: Pairs, batch_size: int, world: int, *, first: int = 0) -> tuple[Any, Any]:
    """Return s and t of 100 batches (100, samples of a process, processes)."""
    batch = batch_at(np.arange(first * batch_size, (first + 100) * batch_size), batch_size)
    s, t = pairs.sample(batch.random, batch.step)
    positions = rank_positions(0, batch_size, rank=1 % world, world=world)
    assert np.array_equal(positions, np.arange(batch_size).reshape(-1, world)[:, 1 % world]), "as dealt below"
    return s.view(100, -1, world).numpy(), t.view(100, -1, world).numpy()


@pytest.mark.parametrize("first", [0, 1_000_003])
@pytest.mark.parametrize("world", range(1, 9))
def test_fixed_roles_have_their_exact_count_in_every_batch_and_on_every_process(world: int, first: int):
    pairs = Pairs(diagonal=0.25, from_noise=0.5, to_data=0.5, inverse=0.5, roles="fixed")
    s, t = of_processes(pairs, 32 * world, world, first=first)
    diagonal, later, earlier = s == t, np.maximum(s, t), np.minimum(s, t)
    assert (diagonal.sum(1) == 8).all() and ((t > s).sum(1) == 12).all()
    for starts, ends in ((later == 1, earlier == 0), (later == 1, earlier > 0), (later < 1, earlier == 0)):
        assert ((starts & ends & ~diagonal).sum(1) == 6).all()
    assert diagonal.any(0).all() and not diagonal.all(0).any(), "no place in a batch has one role for ever"


@pytest.mark.parametrize("batch_size, world", [(100, 1), (100, 4), (96, 8), (15, 3), (7, 7)])
def test_fixed_roles_of_odd_shares_miss_their_count_by_less_than_one(batch_size: int, world: int) -> None:
    s, t = of_processes(Pairs(diagonal=0.37, roles="fixed"), batch_size, world)
    assert (abs((s == t).sum(1) - 0.37 * batch_size / world) < 1).all()
    assert abs((s == t).mean() - 0.37) < 0.01


LOGIT, LATE = {"name": "logit_normal"}, {"name": "logit_normal", "mean": 1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"diagonal": 1, "from_noise": 0.5}, "from_noise has no effect with diagonal 1"),
        ({"diagonal": 1, "roles": "fixed"}, "roles has no effect with diagonal 1"),
        ({"from_noise": 1, "to_data": 1, "target": LOGIT}, "target has no effect with from_noise 1 and to_"),
        ({"from_noise": 1, "to_data": 1, "gap": LOGIT}, "gap has no effect with from_noise 1 and to_data 1"),
        ({"gap": LOGIT, "source": LOGIT}, "source has no effect with gap"),
        ({"gap": LOGIT, "order": "clamped"}, "order has no effect with gap"),
        ({"gap": LOGIT, "to_data": 1, "target": LOGIT}, "target has no effect with gap and every jump from"),
        ({"order": "clamped", "from_noise": 1, "source": LOGIT}, "source has no effect with order clamped"),
        ({"order": "clamped", "to_data": 1, "target": LOGIT}, "target has no effect with order clamped"),
        ({"diagonal": 0, "times": LOGIT, "source": LOGIT, "target": LOGIT}, "times has no effect with diag"),
        ({"diagonal": 0, "times": LOGIT, "from_noise": 1, "to_data": 1}, "times has no effect with diagonal"),
        ({"diagonal": 0, "roles": "fixed"}, "roles has no effect with shares of 0 and 1 alone"),
        ({"limits": [0.5, 0.5]}, r"limits \[0.5, 0.5\] leave no times"),
        ({"order": "clamped", "roles": "fixed"}, "roles fixed counts jumps, but order clamped"),
    ],
)
def test_what_has_no_effect_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Pairs).validate_python(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"diagonal": 0.5, "times": LOGIT, "source": LATE, "target": LATE},
        {"diagonal": 0, "times": LOGIT, "gap": LOGIT},
        {"diagonal": 0, "times": LOGIT, "order": "clamped", "to_data": 1},
        {"order": "clamped", "from_noise": 1, "target": LOGIT, "roles": "fixed"},
        {"from_noise": 1, "to_data": 1, "widen_steps": 10, "inverse": 0.5},
    ],
)
def test_what_has_an_effect_is_taken(settings: Any) -> None:
    whole = TypeAdapter(Pairs).validate_python(settings)
    drawn = whole.sample(RANDOM, START)
    for name in set(settings) - {"diagonal", "roles"}:
        less = {key: value for key, value in settings.items() if key not in (name, "roles")}
        other = TypeAdapter(Pairs).validate_python(less).sample(RANDOM, START)
        assert not (torch.equal(drawn[0], other[0]) and torch.equal(drawn[1], other[1])), name


def test_a_kind_of_times_is_found_by_its_name() -> None:
    assert TypeAdapter(Times).validate_python({"name": "logit_normal", "mean": 1}) == LogitNormal(
        "logit_normal", 1.0
    )
