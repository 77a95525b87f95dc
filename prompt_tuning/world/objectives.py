"""T5's two pre-training objectives on one row of token ids, in NumPy.

Span corruption (Raffel et al. 2020, 3.1.4) first, then prefix language modelling: the
"LM adaptation" after which a frozen model follows a prompt (Lester et al. 2021, 3.3).
Rows come from `pretrain.py`, which turns the pairs into T5X's four arrays with `make_batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Pair = tuple[Int[np.ndarray, "T"], Int[np.ndarray, "L"]]
EOS_ID = 1


def noise_mask(
    length: int, rng: np.random.Generator, *, density: float = 0.15, mean_span: float = 3.0
) -> Bool[np.ndarray, "T"]:
    """True where tokens are to be hidden: random spans, `density` of the row in all.

    The row begins with kept tokens and ends with hidden ones, and the two alternate, so there
    are as many kept spans as hidden ones (T5's rule).
    """
    hidden = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, length - hidden)
    lengths = np.stack(
        [_split(length - hidden, spans, rng), _split(hidden, spans, rng)], axis=1
    ).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _split(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Random positive lengths of `parts` pieces that add up to `total`."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def span_corruption(
    tokens: Int[np.ndarray, "T"],
    rng: np.random.Generator,
    *,
    vocab_size: int,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> Pair:
    """The row with a sentinel for each hidden span, and the spans, each after its sentinel.

    The first sentinel is the last id of the vocabulary, the next the one before it. Both parts
    end with end-of-sequence. A row needs at least two tokens.
    """
    hidden = noise_mask(len(tokens), rng, density=density, mean_span=mean_span)
    kept = _with_sentinels(tokens, hidden, vocab_size)
    spans = _with_sentinels(tokens, ~hidden, vocab_size)
    return _with_eos(kept), _with_eos(spans)


def _with_sentinels(
    tokens: Int[np.ndarray, "T"], replaced: Bool[np.ndarray, "T"], vocab_size: int
) -> Int[np.ndarray, "S"]:
    """The tokens with every replaced stretch reduced to one sentinel."""
    starts = replaced & ~np.concatenate([[False], replaced[:-1]])
    sentinels = vocab_size - np.cumsum(starts)
    return np.where(starts, sentinels, tokens)[starts | ~replaced]


def prefix_lm(
    tokens: Int[np.ndarray, "T"],
    rng: np.random.Generator,
    *,
    longest: int = 16,
    ends: Sequence[int] = (),
) -> Pair:
    """A random stretch of the row, cut at a random place into what is given and what follows.

    A stretch, because text chunks of T5's language modelling end anywhere as well: the end of a
    target, at most `longest` ids with its end-of-sequence, is not always the end of a review.
    With the ids that end sentences in `ends`, every other cut lies behind a sentence, where the
    inputs of a task end. A row needs at least two tokens.
    """
    behind = np.flatnonzero(np.isin(tokens[:-1], ends)) + 1
    if len(behind) and rng.random() < 0.5:
        cut = int(rng.choice(behind))
        start = 0 if rng.random() < 0.7 else int(rng.integers(cut))
        stop = len(tokens)
    else:
        start, cut, stop = np.sort(rng.choice(len(tokens) + 1, 3, replace=False))
    return _with_eos(tokens[start:cut]), _with_eos(tokens[cut : min(stop, cut + longest - 1)])


def _with_eos(tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "S"]:
    return np.append(tokens, EOS_ID).astype(np.int32)


def make_batch(pairs: Sequence[Pair], lengths: tuple[int, int]) -> dict[str, np.ndarray]:
    """T5X's four arrays, padded with 0 to `lengths` (inputs, targets) and cut off there."""
    inputs_length, targets_length = lengths
    inputs = np.zeros((len(pairs), inputs_length), np.int32)
    targets = np.zeros((len(pairs), targets_length), np.int32)
    for row, (given, wanted) in enumerate(pairs):
        inputs[row, : len(given)] = given[:inputs_length]
        targets[row, : len(wanted)] = wanted[:targets_length]
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }
