"""Batches whose rows have prompts of different lengths: their arrays, generation and scores.

`predictor.py`, which works with names and texts, calls this; it calls the model with arrays alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from prompt_tuning.decoding import decode
from prompt_tuning.model import loss, t5
from prompt_tuning.model.prompt import Encoded, Prompt, encode

LEAST_WIDTH = 16  # the smallest width of a batch


class MixedBatch(NamedTuple):
    """Tokens, and the prompt `which` of each row; S is the longest row with its prompt, padded."""

    tokens: Int[Array, "B S"]
    which: Int[Array, "B"]


def mixed_batches(
    rows: Sequence[Sequence[int]],
    which: Sequence[int],
    lengths: Sequence[int],
    *,
    batch_size: int,
    multiple: int = 1,
) -> Iterator[tuple[list[int], MixedBatch]]:
    """Batches of rows of similar length, longest first, and the numbers of the rows in each.

    `lengths` are the prompts'. The size of a batch is padded to a power of two or to `batch_size`,
    and to a `multiple`, so that few shapes are compiled. The padding is copies of the last row, so
    that it needs no further decoding steps.
    """
    widths = [lengths[n] + len(row) for n, row in zip(which, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        size = min(power_of_two(len(places)), batch_size)
        size = -(-size // multiple) * multiple
        padded = places + [places[-1]] * (size - len(places))
        tokens = np.zeros((size, padded_width(widths[places[0]])), np.int32)
        for row, place in zip(tokens, padded, strict=True):
            row[: len(rows[place])] = rows[place]
        numbers = np.asarray([which[place] for place in padded], np.int32)
        yield places, MixedBatch(tokens, numbers)  # type: ignore[arg-type]


def padded_width(width: int) -> int:
    """The width that a batch is padded to; few values, because each is compiled.

    >>> [padded_width(n) for n in (1, 17, 33, 130, 612)]
    [16, 32, 48, 192, 768]
    """
    step = max(LEAST_WIDTH, power_of_two(width) // 4)
    return max(1, -(-width // step)) * step


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`.

    >>> [power_of_two(n) for n in (1, 3, 16, 17)]
    [1, 4, 16, 32]
    """
    return 1 << max(number - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnames=("model", "search"))
def generate(
    backbone: t5.Params,
    prompts: Prompt,
    batch: MixedBatch,
    rows: Int[Array, "B"],
    *,
    model: t5.T5,
    search: decode.Search,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """All outputs of every row, the best last, and their scores, as `decode.generate_all`.

    `rows` are the numbers of the rows. The samples of a row depend on its number, not on its batch.
    """
    encoded = encode_mixed(model, backbone, prompts, batch)
    which = batch.which
    return decode.generate_all(model, backbone, prompts, encoded, search, which, numbers=rows)


@functools.partial(jax.jit, static_argnames=("model",))
def score(
    backbone: t5.Params,
    prompts: Prompt,
    batch: MixedBatch,
    labels: Int[Array, "C L"],
    *,
    model: t5.T5,
) -> Float[Array, "B C"]:
    """Log p [B, C] of every label for every row; each row is encoded once."""
    encoded = encode_mixed(model, backbone, prompts, batch)
    return loss.label_log_likelihoods(model, backbone, prompts, encoded, labels, batch.which)


def encode_mixed(model: t5.T5, backbone: t5.Params, prompts: Prompt, batch: MixedBatch) -> Encoded:
    """`encode` of a batch whose width holds every row with its own prompt."""
    width = batch.tokens.shape[1]
    return encode(model, backbone, prompts, batch.tokens, batch.which, width=width)
