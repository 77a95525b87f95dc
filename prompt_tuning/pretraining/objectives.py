"""T5's two pre-training objectives on a chunk of token ids, in NumPy.

Span corruption (Raffel et al. 2020, 3.1.4) trains a T5. Prefix language modelling, the "LM
adaptation", then makes it a model that a prompt can steer (Lester et al. 2021, 3.3). `examples.py`
passes a chunk and its random words; the corruption is a function of them alone. The words are from
a counter-based generator, which is the same in all versions of NumPy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

EOS_ID = 1  # T5's
Words = UInt64[np.ndarray, "_"]


class Pair(NamedTuple):
    """The inputs of the encoder and the targets of the decoder; both end with EOS."""

    inputs: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "L"]


class SpanLengths(NamedTuple):
    """The length of a chunk, and of its inputs and targets after span corruption, with EOS."""

    tokens: int
    inputs: int
    targets: int


def count_noise(length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """The number of masked tokens of a chunk, and the number of their spans; deterministic.

    Computed in float32, with halves rounded to even, as in T5.

    >>> count_noise(568), count_noise(2)
    ((85, 28), (1, 1))
    """
    masked = int(np.round(np.float32(length) * np.float32(density)))
    masked = min(max(masked, 1), length - 1)
    spans = max(int(np.round(np.float32(masked) / np.float32(mean_span))), 1)
    return masked, min(spans, masked, length - masked)


def corrupted_lengths(length: int, density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """The lengths of inputs and targets of a corrupted chunk of `length` tokens.

    >>> corrupted_lengths(568)
    SpanLengths(tokens=568, inputs=512, targets=114)
    """
    masked, spans = count_noise(length, density, mean_span)
    return SpanLengths(length, length - masked + spans + 1, masked + spans + 1)


def span_lengths(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """The lengths of the longest chunk whose corrupted inputs fit `inputs`.

    As T5's `random_spans_helper`: inputs have no padding, targets are as long as needed.

    >>> span_lengths(1024)
    SpanLengths(tokens=1137, inputs=1024, targets=229)
    """
    tokens = max(inputs - 1, 2)
    while corrupted_lengths(tokens + 1, density, mean_span).inputs <= inputs:
        tokens += 1
    return corrupted_lengths(tokens, density, mean_span)


def noise_words(length: int) -> int:
    """The number of random words that `noise_mask` needs."""
    return max(length - 2, 0)


def noise_mask(
    length: int, words: Words, *, density: float = 0.15, mean_span: float = 3.0
) -> Bool[np.ndarray, "T"]:
    """The mask of a chunk, True for masked tokens: random spans, `density` of the chunk.

    Unmasked and masked spans alternate, beginning with an unmasked span, so their numbers are
    equal. All such masks are equally likely, as in T5.
    """
    masked, spans = count_noise(length, density, mean_span)
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _split(length - masked, spans, words[: length - masked - 1])
    lengths[1::2] = _split(masked, spans, words[length - masked - 1 :])
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _split(total: int, parts: int, words: Words) -> Int[np.ndarray, "N"]:
    """Positive lengths of `parts` pieces that add up to `total`, every split equally likely."""
    cuts = np.sort(np.argsort(words[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def span_corruption(
    tokens: Int[np.ndarray, "T"],
    words: Words,
    *,
    vocab_size: int,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> Pair:
    """Inputs: the chunk with a sentinel for each masked span. Targets: each sentinel and its span.

    The first sentinel is the last id of the vocabulary; the ids of the next ones descend. A chunk
    needs at least two tokens.
    """
    mask = noise_mask(len(tokens), words, density=density, mean_span=mean_span)
    return Pair(
        _with_eos(with_sentinels(tokens, mask, vocab_size)),
        _with_eos(with_sentinels(tokens, ~mask, vocab_size)),
    )


def with_sentinels(
    tokens: Int[np.ndarray, "T"], replaced: Bool[np.ndarray, "T"], vocab_size: int
) -> Int[np.ndarray, "S"]:
    """The tokens with every replaced span reduced to one sentinel.

    >>> with_sentinels(np.array([5, 6, 7, 8]), np.array([False, True, True, False]), 100).tolist()
    [5, 99, 8]
    """
    starts = replaced & ~np.concatenate([[False], replaced[:-1]])
    sentinels = vocab_size - np.cumsum(starts)
    return np.where(starts, sentinels, tokens)[starts | ~replaced]


def prefix_cut(length: int, word: int, *, inputs: int, targets: int) -> int:
    """The index at which a chunk is cut into inputs and targets, uniform where both parts fit.

    `inputs` and `targets` are the maximal lengths, EOS included. A chunk of fewer than `inputs`
    tokens always has such an index.

    >>> sorted({prefix_cut(5, word, inputs=4, targets=8) for word in range(9)})
    [1, 2, 3]
    """
    first = max(1, length - (targets - 1))
    last = min(length - 1, inputs - 1)
    return first + int(word) % (last - first + 1)


def prefix_lm(tokens: Int[np.ndarray, "T"], cut: int) -> Pair:
    """Inputs: the chunk up to `cut`. Targets: the rest.

    >>> pair = prefix_lm(np.array([5, 6, 7]), 1)
    >>> pair.inputs.tolist(), pair.targets.tolist()
    ([5, 1], [6, 7, 1])
    """
    return Pair(_with_eos(tokens[:cut]), _with_eos(tokens[cut:]))


def _with_eos(tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "S"]:
    return np.append(tokens, EOS_ID).astype(np.int32)
