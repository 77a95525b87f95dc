"""The training order: the row at every position, computed from (seed, position).

There is no iterator and no state: `batching.train_batch` asks for the positions of a step, so a run
resumes at any step, on any number of hosts, without a saved position. Every epoch of a task is a
permutation of its rows. A mixture is dealt in blocks of `BLOCK` positions: each task has its exact
share of a block, in an order drawn for the block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, UInt64

# Small enough for the proportions to hold in a short run, large enough to mix the tasks.
BLOCK = 256


def row_order(
    seed: int,
    sizes: Sequence[int],
    rates: Sequence[float],
    positions: Int64[np.ndarray, "B"],
) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
    """The task, and the row of it, at each position of the endless order.

    >>> task, row = row_order(0, sizes=[3], rates=[1.0], positions=np.arange(6))
    >>> sorted(row[:3].tolist()), sorted(row[3:].tolist())
    ([0, 1, 2], [0, 1, 2])
    """
    task, draw = np.empty_like(positions), np.empty_like(positions)
    blocks, slots = np.divmod(positions, BLOCK)
    for block in np.unique(blocks):
        here = blocks == block
        block_task, block_draw = _deal(seed, tuple(rates), int(block))
        task[here], draw[here] = block_task[slots[here]], block_draw[slots[here]]
    epochs, places = np.divmod(draw, np.asarray(sizes)[task])
    row = [
        _permutation(seed, 1 + int(t), int(epoch), sizes[t])[place]
        for t, epoch, place in zip(task, epochs, places, strict=True)
    ]
    return task, np.asarray(row, np.int64)


def draws_before(rates: Sequence[float], position: int) -> list[int]:
    """The number of draws of each task before `position`, the start of a block.

    The first task gets its rounded share, the next its share of the rest, and so on. So the counts
    add up to `position`, no count falls as `position` grows, and each differs from rate * position
    by less than half the number of tasks. Fractions, because floats would round twice.

    >>> draws_before([250.0, 2490.0, 9427.0], 256)
    [5, 52, 199]
    """
    shares = [Fraction(rate) for rate in rates]
    left, rest, counts = position, sum(shares), []
    for share in shares:
        count = (2 * left * share + rest) // (2 * rest) if rest else 0
        counts.append(count)
        left, rest = left - count, rest - share
    return counts


@functools.lru_cache(maxsize=8)
def _deal(
    seed: int, rates: tuple[float, ...], block: int
) -> tuple[Int64[np.ndarray, "256"], Int64[np.ndarray, "256"]]:
    """The task at every slot of a block, and the number of its draw of that task, from 0."""
    start, end = (draws_before(rates, n * BLOCK) for n in (block, block + 1))
    counts = np.subtract(end, start)
    task = np.repeat(np.arange(len(rates)), counts)[_permutation(seed, 0, block, BLOCK)]
    draw = np.empty(BLOCK, np.int64)
    for t, first in enumerate(start):
        draw[task == t] = first + np.arange(counts[t])
    return task, draw


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, stream: int, index: int, n: int) -> Int64[np.ndarray, "n"]:
    """Permutation `index` of a stream: stream 0 is the blocks, 1 + i the epochs of task i.

    It sorts the words of a counter-based generator: NumPy guarantees the words of its bit
    generators across versions, but not the results of `Generator.permutation`.
    """
    return np.argsort(random_words((seed, stream), (0, index), n), kind="stable")


def random_words(key: Sequence[int], counter: Sequence[int], n: int) -> UInt64[np.ndarray, "n"]:
    """Words of a counter-based generator; the counter has two numbers."""
    counters = np.array([0, 0, *counter], np.uint64)
    return np.random.Philox(key=np.array(key, np.uint64), counter=counters).random_raw(n)
