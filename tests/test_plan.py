"""The order of samples is a pure function, and every epoch holds every sample exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftmap.data.plan import Plan, rank_positions

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any).map(tuple)
PLANS = st.builds(Plan, COUNTS, st.integers(0, 2**40), st.integers(0, 9))


@settings(deadline=None)
@given(PLANS, st.integers(0, 1000))
def test_each_epoch_holds_each_sample_once(plan, epoch):
    n = plan.num_samples
    samples = plan.samples(epoch * n, (epoch + 1) * n)
    assert sorted(samples) == list(range(n))


@settings(deadline=None)
@given(PLANS, st.lists(st.integers(0, 300), min_size=2, max_size=6))
def test_pieces_joined_are_the_whole(plan, cuts):
    cuts = sorted(cuts)
    pieces = [plan.samples(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    assert np.array_equal(np.concatenate(pieces), plan.samples(cuts[0], cuts[-1]))


@settings(deadline=None)
@given(PLANS, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_any_positions_in_any_order(plan, positions):
    found = plan.at(np.array(positions))
    assert list(found) == [plan.samples(position, position + 1)[0] for position in positions]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8))
def test_ranks_partition_a_batch(start, world, per_rank):
    batch_size = world * per_rank
    parts = [rank_positions(start, batch_size, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in parts} == {per_rank}
    assert sorted(np.concatenate(parts)) == list(range(start, start + batch_size))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_window_reads_few_shards_at_a_time(seed, window):
    plan = Plan((10,) * 12, seed, window)
    shards = plan.samples(0, 120) // 10
    for number in range(0, 120, 10 * window):
        assert len(set(shards[number : number + 10 * window])) == min(window, 12 - number // 10)


def test_seeds_and_epochs_differ():
    orders = {
        tuple(Plan((50, 50), seed).samples(epoch * 100, epoch * 100 + 100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_of_shards_changes_too():
    firsts = {int(Plan((10,) * 8, 0, 1).samples(epoch * 80, epoch * 80 + 1)[0]) // 10 for epoch in range(100)}
    assert firsts == set(range(8))


def test_the_shuffle_leaves_no_trace_of_the_order():
    n = 5000
    ranks = np.arange(n)
    for seed in range(5):
        samples = Plan((1000,) * 5, seed).samples(0, n)
        other = Plan((1000,) * 5, seed).samples(n, 2 * n)
        # The standard deviation of each of these correlations is 1 / sqrt(n), 0.014.
        assert abs(np.corrcoef(ranks, samples)[0, 1]) < 0.07
        assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.07
        assert abs(np.corrcoef(samples, other)[0, 1]) < 0.07
        assert np.sum(samples == other) < 10  # 1 is expected
        assert np.sum(np.diff(samples) == 1) < 10  # 1 is expected


def test_small_windows_are_shuffled_evenly():
    # Each of the 6 orders of 3 samples is expected 500 times out of 3000, with a deviation of 20.
    orders = Plan((3,), 7).samples(0, 9000).reshape(-1, 3)
    _, times = np.unique(orders, axis=0, return_counts=True)
    assert len(times) == 6
    assert times.min() > 380 and times.max() < 620


def test_a_sample_far_into_a_large_plan_needs_no_table():
    plan = Plan((10_000,) * 1000, 3)
    start = 17 * plan.num_samples + 123_456
    assert np.array_equal(plan.samples(start, start + 4), plan.samples(start - 4, start + 4)[4:])


def test_names_shuffle_samples_otherwise_but_not_the_order_of_shards():
    one, two = (Plan((9, 0, 7, 8), 5, 1, name).located(np.arange(240)) for name in ("", " two"))
    assert np.array_equal(one[0], two[0])
    assert not np.array_equal(one[1], two[1])


def test_stand_ins_are_drawn_from_the_next_epoch_of_positions():
    plan = Plan((4, 3), 1)
    found = plan.alike(20, np.array([0, 6, 7, 2**64 - 1], np.uint64))
    assert np.array_equal(found, plan.at(np.array([21, 27, 21, 22])))


def test_the_order_never_changes_between_versions():
    """A run that is resumed with a newer version must go on in the same order."""
    assert Plan((4, 3, 5), 1, 2).samples(0, 12).tolist() == [10, 9, 7, 4, 11, 6, 5, 8, 2, 1, 0, 3]


@pytest.mark.parametrize(
    ("counts", "window", "message"),
    [((), 0, "0 samples"), ((0, 0), 0, "0 samples"), ((3,), -1, "window is -1; expected a number of shards")],
)
def test_mistakes_are_explained(counts, window, message):
    with pytest.raises(ValueError, match=message):
        Plan(counts, 0, window)


def test_there_is_nothing_before_the_start():
    with pytest.raises(ValueError, match="position -1 is before the start"):
        Plan((3,), 0).samples(-1, 2)
