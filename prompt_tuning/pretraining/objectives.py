"""T5's two pre-training objectives on a chunk of token ids, in NumPy.

Span corruption (Raffel et al. 2020, 3.1.4) makes a T5; prefix language modelling, the "LM
adaptation", makes of it a model that a prompt can steer (Lester et al. 2021, 3.3). `examples.py`
says which chunk stands where, and gives each its random words: what is hidden is a function of them
alone. The words are those of a counter-based generator, which NumPy keeps from version to version.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

EOS_ID = 1  # T5's
Words = UInt64[np.ndarray, "_"]


class Pair(NamedTuple):
    """What the encoder is given and what the decoder has to say; both end with EOS."""

    inputs: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "L"]


class SpanLengths(NamedTuple):
    """The length of a chunk, and of what span corruption makes of it, EOS included."""

    tokens: int
    inputs: int
    targets: int


def count_noise(length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many tokens of a chunk are hidden, and in how many spans; chance has no part in it.

    In float32 and rounding halves to even, as T5 does.

    >>> count_noise(568), count_noise(2)
    ((85, 28), (1, 1))
    """
    hidden = int(np.round(np.float32(length) * np.float32(density)))
    hidden = min(max(hidden, 1), length - 1)
    spans = max(int(np.round(np.float32(hidden) / np.float32(mean_span))), 1)
    return hidden, min(spans, hidden, length - hidden)


def corrupted_lengths(length: int, density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """The lengths of inputs and targets that a chunk of `length` tokens becomes.

    >>> corrupted_lengths(568)
    SpanLengths(tokens=568, inputs=512, targets=114)
    """
    hidden, spans = count_noise(length, density, mean_span)
    return SpanLengths(length, length - hidden + spans + 1, hidden + spans + 1)


def span_lengths(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """The longest chunk whose corrupted form fits `inputs`, and the targets that it needs.

    T5's rule (its `random_spans_helper`): no padding in the inputs, and targets cut to measure.

    >>> span_lengths(1024)
    SpanLengths(tokens=1137, inputs=1024, targets=229)
    """
    tokens = max(inputs - 1, 2)
    while corrupted_lengths(tokens + 1, density, mean_span).inputs <= inputs:
        tokens += 1
    return corrupted_lengths(tokens, density, mean_span)


def noise_words(length: int) -> int:
    """How many random words `noise_mask` takes."""
    return max(length - 2, 0)


def noise_mask(
    length: int, words: Words, *, density: float = 0.15, mean_span: float = 3.0
) -> Bool[np.ndarray, "T"]:
    """True where tokens are to be hidden: random spans, `density` of the chunk in all.

    Kept and hidden spans alternate and the chunk begins with a kept one, so there are as many of
    the one kind as of the other; all such masks are equally likely (T5's rule).
    """
    hidden, spans = count_noise(length, density, mean_span)
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _split(length - hidden, spans, words[: length - hidden - 1])
    lengths[1::2] = _split(hidden, spans, words[length - hidden - 1 :])
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
    """The chunk with a sentinel for each hidden span, and the spans, each behind its sentinel.

    The first sentinel is the last id of the vocabulary, the next the one before it. A chunk needs
    at least two tokens.
    """
    hidden = noise_mask(len(tokens), words, density=density, mean_span=mean_span)
    return Pair(
        _with_eos(with_sentinels(tokens, hidden, vocab_size)),
        _with_eos(with_sentinels(tokens, ~hidden, vocab_size)),
    )


def with_sentinels(
    tokens: Int[np.ndarray, "T"], replaced: Bool[np.ndarray, "T"], vocab_size: int
) -> Int[np.ndarray, "S"]:
    """The tokens with every replaced stretch reduced to one sentinel.

    >>> with_sentinels(np.array([5, 6, 7, 8]), np.array([False, True, True, False]), 100).tolist()
    [5, 99, 8]
    """
    starts = replaced & ~np.concatenate([[False], replaced[:-1]])
    sentinels = vocab_size - np.cumsum(starts)
    return np.where(starts, sentinels, tokens)[starts | ~replaced]


def prefix_cut(length: int, word: int, *, inputs: int, targets: int) -> int:
    """Where a chunk is cut into what is given and what follows: anywhere that both parts fit.

    `inputs` and `targets` are the longest they may be, EOS included; a chunk of fewer than
    `inputs` tokens always has such a place.

    >>> sorted({prefix_cut(5, word, inputs=4, targets=8) for word in range(9)})
    [1, 2, 3]
    """
    first = max(1, length - (targets - 1))
    last = min(length - 1, inputs - 1)
    return first + int(word) % (last - first + 1)


def prefix_lm(tokens: Int[np.ndarray, "T"], cut: int) -> Pair:
    """The chunk up to `cut`, and what follows.

    >>> pair = prefix_lm(np.array([5, 6, 7]), 1)
    >>> pair.inputs.tolist(), pair.targets.tolist()
    ([5, 1], [6, 7, 1])
    """
    return Pair(_with_eos(tokens[:cut]), _with_eos(tokens[cut:]))


def _with_eos(tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "S"]:
    return np.append(tokens, EOS_ID).astype(np.int32)
