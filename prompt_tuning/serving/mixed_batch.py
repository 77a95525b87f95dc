"""Rows under prompts of different lengths in one batch: the arrays, and what the model makes of it.

Between `predictor.py`, which knows names and texts, and the model, which knows neither.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning.config import ModelConfig
from prompt_tuning.decoding import decode
from prompt_tuning.decoding.sample import row_keys
from prompt_tuning.model import loss, t5
from prompt_tuning.model.prompt import fill_up

LEAST_WIDTH = 16  # of a batch


class PromptTable(NamedTuple):
    """All prompts as one array, filled up to the longest; the last one is no prompt."""

    values: Float[Array, "N P D"]
    lengths: Int[Array, "N"]


class MixedBatch(NamedTuple):
    """Tokens that leave as much room in front of a row as its prompt, number `which`, is long."""

    tokens: Int[Array, "B S"]
    which: Int[Array, "B"]


def make_table(prompts: Sequence[Any], embed_dim: int) -> PromptTable:
    """The table of some prompts [P, D], and of no prompt behind them."""
    lengths = [*(prompt.shape[0] for prompt in prompts), 0]
    values = np.zeros((len(lengths), max(lengths), embed_dim), np.float32)
    for row, prompt in zip(values, prompts, strict=False):
        row[: len(prompt)] = np.asarray(prompt, np.float32)
    return PromptTable(jnp.asarray(values), jnp.asarray(lengths, jnp.int32))


def mixed_batches(
    rows: Sequence[Sequence[int]],
    which: Sequence[int],
    lengths: Sequence[int],
    *,
    batch_size: int,
    multiple: int = 1,
) -> Iterator[tuple[list[int], MixedBatch]]:
    """Batches of rows of like length, longest first, and the numbers of the rows in each.

    `lengths` are the prompts'. A batch is filled up to a power of two or to `batch_size`, and to a
    `multiple`, with copies of its last row: few shapes are compiled, and a copy of a row ends when
    the row does.
    """
    widths = [lengths[n] + len(row) for n, row in zip(which, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        size = min(power_of_two(len(places)), batch_size)
        size = -(-size // multiple) * multiple
        filled = places + [places[-1]] * (size - len(places))
        tokens = np.zeros((size, padded_width(widths[places[0]])), np.int32)
        for row, place in zip(tokens, filled, strict=True):
            row[lengths[which[place]] : widths[place]] = rows[place]
        numbers = np.asarray([which[place] for place in filled], np.int32)
        yield places, MixedBatch(tokens, numbers)  # type: ignore[arg-type]


def padded_width(width: int) -> int:
    """The width a batch is padded to: two to an octave, since every width is compiled.

    >>> [padded_width(n) for n in (1, 17, 33, 130, 612)]
    [16, 32, 48, 192, 768]
    """
    step = max(LEAST_WIDTH, power_of_two(width) // 4)
    return max(1, -(-width // step)) * step


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number.

    >>> [power_of_two(n) for n in (1, 3, 16, 17)]
    [1, 4, 16, 32]
    """
    return 1 << max(number - 1, 0).bit_length()


def prepend_each(
    table: PromptTable, which: Int[Array, "B"], x: Float[Array, "B S D"], valid: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
    """Puts every row's own prompt into the room that was left in front of its text.

    The text starts where the prompt ends and padding comes last, as when the row is alone: padding
    between the two would shift the relative positions from one to the other.
    """
    width = x.shape[1]
    in_prompt = jnp.arange(width)[None, :] < table.lengths[which][:, None]
    own = jnp.take(table.values, which, axis=0)[:, :width]
    own = jnp.pad(own, ((0, 0), (0, width - own.shape[1]), (0, 0)))
    return jnp.where(in_prompt[..., None], own.astype(x.dtype), x), in_prompt | valid


def encode_mixed(
    config: ModelConfig, backbone: t5.Params, table: PromptTable, batch: MixedBatch
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
    """The encoder's output and which of its positions are valid: `encode_prompted`, row by row."""
    x = t5.apply(config, backbone, "embed", batch.tokens)
    x, valid = fill_up(config, *prepend_each(table, batch.which, x, batch.tokens > 0))
    return t5.apply(config, backbone, "encode", x, valid), valid


@functools.partial(jax.jit, static_argnames=("config", "search"))
def generate(
    backbone: t5.Params,
    table: PromptTable,
    batch: MixedBatch,
    rows: Int[Array, "B"],
    *,
    config: ModelConfig,
    search: decode.Search,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """All outputs of every row, the best last, and their scores, as `decode.generate_all`.

    `rows` are the numbers of the rows, by which each draws its samples, whatever batch it is in.
    """
    encoded = encode_mixed(config, backbone, table, batch)
    samples = search.decoding.method == "sample"
    keys = row_keys(search.decoding.seed, rows) if samples else None
    return decode.generate_all(config, backbone, encoded, search, keys)


@functools.partial(jax.jit, static_argnames=("config",))
def score(
    backbone: t5.Params,
    table: PromptTable,
    batch: MixedBatch,
    labels: Int[Array, "C L"],
    *,
    config: ModelConfig,
) -> Float[Array, "B C"]:
    """Log p of every label for every row; each row is encoded once."""
    encoded = encode_mixed(config, backbone, table, batch)
    return loss.label_log_likelihoods(config, backbone, encoded, labels)
