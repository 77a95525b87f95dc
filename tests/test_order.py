"""The training order: complete epochs, exact proportions, nothing but (seed, position)."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.batches import order

seeds = st.integers(0, 2**32 - 1)
mixtures = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.01, 1.0, 2.5, 250.0, 9427.0])),
    min_size=1,
    max_size=5,
).filter(lambda tasks: sum(rate for _, rate in tasks) > 0)


def rows_at(seed, sizes, rates, positions):
    return order.row_order(seed, sizes, rates, np.asarray(positions, np.int64))


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.integers(1, 8))
def test_every_row_once_an_epoch(seed, size, epochs):
    _, rows = rows_at(seed, [size], [1.0], range(size * epochs))
    for epoch in np.split(rows, epochs):
        assert sorted(epoch) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(seeds, mixtures)
def test_every_row_of_every_task_once_an_epoch(seed, tasks):
    sizes, rates = zip(*tasks, strict=True)
    task, row = rows_at(seed, sizes, rates, range(3 * order.BLOCK))
    for t, size in enumerate(sizes):
        drawn = row[task == t]
        whole = len(drawn) // size * size
        for epoch in drawn[:whole].reshape(-1, size):
            assert sorted(epoch) == list(range(size))
        assert len(set(drawn[whole:])) == len(drawn) - whole  # the epoch that has begun


@settings(max_examples=50, deadline=None)
@given(seeds, mixtures, st.integers(0, 20))
def test_a_block_holds_each_task_its_exact_share(seed, tasks, block):
    sizes, rates = zip(*tasks, strict=True)
    start, end = block * order.BLOCK, (block + 1) * order.BLOCK
    task, _ = rows_at(seed, sizes, rates, range(start, end))
    counts = np.bincount(task, minlength=len(rates))
    expected = np.subtract(order.draws_before(rates, end), order.draws_before(rates, start))
    assert counts.tolist() == expected.tolist()


@settings(deadline=None)
@given(mixtures, st.integers(0, 10_000))
def test_shares_add_up_never_fall_and_stay_near_the_rates(tasks, position):
    rates = [rate for _, rate in tasks]
    now, then = order.draws_before(rates, position), order.draws_before(rates, position + 1)
    assert sum(now) == position
    assert sorted(np.subtract(then, now)) == [0] * (len(rates) - 1) + [1]
    total = sum(map(Fraction, rates))
    for rate, count in zip(rates, now, strict=True):
        assert abs(count - Fraction(rate) / total * position) <= Fraction(len(rates), 2)
        assert count == 0 or rate > 0


def test_superglue_in_proportion_to_its_rows():
    rates = [9427.0, 250.0, 2490.0]  # one epoch of all three, and 47 whole blocks of it
    assert order.draws_before(rates, 12167) == [9427, 250, 2490]
    task, _ = rows_at(0, [9427, 250, 2490], rates, range(47 * order.BLOCK))
    assert np.abs(np.bincount(task) / len(task) - np.array(rates) / 12167).max() < 1e-4


@settings(max_examples=50, deadline=None)
@given(seeds, mixtures, st.integers(0, 5000), st.integers(1, 64))
def test_resuming_anywhere_is_the_same_order(seed, tasks, start, count):
    sizes, rates = zip(*tasks, strict=True)
    straight = np.stack(rows_at(seed, sizes, rates, range(start + count)))
    resumed = np.stack(rows_at(seed, sizes, rates, range(start, start + count)))
    np.testing.assert_array_equal(straight[:, start:], resumed)


def test_seeds_tasks_and_epochs_have_orders_of_their_own():
    def epoch(seed, number, size=50):
        positions = range(number * size, (number + 1) * size)
        return tuple(rows_at(seed, [size], [1.0], positions)[1])

    assert len({epoch(seed, number) for seed in range(4) for number in range(4)}) == 16
    task, row = rows_at(0, [50, 50], [1.0, 1.0], range(order.BLOCK))
    assert tuple(row[task == 0][:50]) != tuple(row[task == 1][:50])
    first = [tuple(rows_at(0, [9, 9], [1.0, 1.0], range(n, n + 256))[0]) for n in (0, 256)]
    assert first[0] != first[1]  # nor do two blocks deal the tasks alike


def test_the_order_is_kept_from_version_to_version():
    """A run that an older version has begun must continue in the same order."""
    task, row = rows_at(7, [4, 3], [1.0, 2.0], range(12))
    assert task.tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert row.tolist() == [0, 3, 1, 2, 0, 1, 2, 1, 0, 2, 2, 1]
