"""The training order: which row stands at which position, as arithmetic on (seed, position).

No iterator and no state: `features.train_batch` asks for the positions of a step, so resuming at a
step, or on another number of hosts, needs nothing that was saved. A task is gone through in
epochs, each a permutation of its rows. A mixture is dealt in blocks of `BLOCK` positions that hold
each task its exact share of times, in an order drawn for the block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

# Small enough that a short run sees the proportions, large enough that tasks come in random order.
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
    """How often each task has been drawn when all blocks before `position` are dealt.

    The first task gets its rounded share, the next one its share of what is left, and so on. So
    the counts add up to `position`, no count ever falls as `position` grows, and each differs from
    rate * position by less than half the number of tasks. Fractions: floats would round twice.

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
    """The task at every slot of a block, and which draw of that task it is, counted from 0."""
    start, end = (draws_before(rates, n * BLOCK) for n in (block, block + 1))
    counts = np.subtract(end, start)
    task = np.repeat(np.arange(len(rates)), counts)[_permutation(seed, 0, block, BLOCK)]
    draw = np.empty(BLOCK, np.int64)
    for t, first in enumerate(start):
        draw[task == t] = first + np.arange(counts[t])
    return task, draw


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, stream: int, index: int, n: int) -> Int64[np.ndarray, "n"]:
    """The permutation number `index` of a stream: 0 for the blocks, 1 + i for task i's epochs.

    Sorted words of a counter-based generator, because NumPy keeps the words of its bit generators
    from version to version, and does not promise that for `Generator.permutation`.
    """
    key, counter = (np.array(words, np.uint64) for words in ([seed, stream], [0, 0, 0, index]))
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    return np.argsort(words, kind="stable")
