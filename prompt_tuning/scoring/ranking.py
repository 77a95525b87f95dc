"""Ranks what a row may be answered with by its probability, every word of a row in one batch.

A row is encoded once, whatever the number of its words. Rows may have different words, as ReCoRD's
have their entities: pairs of a row and a word are packed into chunks of one size, so that a task is
compiled once for each width of its inputs and words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.data.groups import fitting_width, input_widths
from prompt_tuning.model import loss, t5
from prompt_tuning.scoring.eval_task import EvalTask

Ids = tuple[int, ...]
MOST_WORDS = 4  # a chunk holds so many words for each row of a batch, or those of one row


class Chunk(NamedTuple):
    """K pairs of a row of the batch and one of its words; unused ones are row 0, no tokens."""

    row: Int32[np.ndarray, "K"]
    tokens: Int32[np.ndarray, "K L"]
    used: int  # pairs; they stand first


def word_ids(task: EvalTask) -> list[list[Ids]]:
    """The tokens of every word of every row, end-of-sequence included.

    Raises:
      ConfigError: a row has no words, or a word has no tokens.
    """
    feature = task.task.output_features["targets"]
    end = (feature.vocabulary.eos_id,) if feature.add_eos else ()
    known: dict[str, Ids] = {}
    found = []
    for row in range(len(task.rows)):
        words = task.words(row)
        for word in words:
            if word not in known:
                known[word] = (*map(int, feature.vocabulary.encode(word)), *end)
        if not words or not all(known[word] for word in words):
            raise ConfigError(
                f"row {row} of {task.name} cannot be ranked: its words are {words!r}, and there "
                "must be one at least, none of them empty. Set EVAL_METHOD = 'generate'."
            )
        found.append([known[word] for word in words])
    return found


def chunks(words: Sequence[Sequence[Ids]], size: int, longest: int) -> Iterator[Chunk]:
    """The pairs of a batch in chunks of `size`, each row's within one.

    The tokens of a chunk are padded to one of a few widths, the widest holding `longest`.
    """
    pairs: list[tuple[int, Ids]] = []
    for row, ids in enumerate(words):
        if len(pairs) + len(ids) > size:
            yield _chunk(pairs, size, longest)
            pairs = []
        pairs += [(row, tokens) for tokens in ids]
    if pairs:
        yield _chunk(pairs, size, longest)


def _chunk(pairs: Sequence[tuple[int, Ids]], size: int, longest: int) -> Chunk:
    widest = max(len(ids) for _, ids in pairs)
    width = fitting_width(widest, input_widths(longest))
    row, tokens = np.zeros(size, np.int32), np.zeros((size, width), np.int32)
    for k, (index, ids) in enumerate(pairs):
        row[k] = index
        tokens[k, : len(ids)] = ids
    return Chunk(row, tokens, len(pairs))


def chunk_size(words: Sequence[Sequence[Ids]], batch_size: int) -> int:
    """How many pairs a chunk holds: a multiple of the batch that any one row fits into.

    >>> chunk_size([[(5,), (6,)]] * 9, 8), chunk_size([[(5,)] * 50], 8)
    (16, 56)
    """
    most = max(map(len, words))
    return batch_size * min(most, max(MOST_WORDS, -(-most // batch_size)))


def score_pairs(
    config: ModelConfig,
    backbone: t5.Params,
    encoded: tuple[Float[Array, "B S D"], Bool[Array, "B S"]],
    row: Int32[Array, "K"],
    tokens: Int32[Array, "K L"],
) -> Float[Array, "K"]:
    """Log p of every word for its row: the sum over the word's tokens."""
    return loss.pair_log_likelihoods(config, backbone, encoded, row, tokens)


def rank(evaluator: Any, params: Any, task: EvalTask) -> list[list[float]]:
    """The score of every word of every row: log p, or its mean over the word's tokens.

    Raises:
      FloatingPointError: a score is not a number.
    """
    words = word_ids(task)
    size = chunk_size(words, evaluator.batch_size)
    longest = max(len(ids) for row in words for ids in row)
    parts = []
    for tokens, places in evaluator.batches(task.rows):
        encoded = evaluator.encode(*params, tokens)
        for chunk in chunks([words[place] for place in places], size, longest):
            pair = evaluator.place(row=chunk.row, tokens=chunk.tokens)
            found = evaluator.score_pairs(params[0], encoded, pair["row"], pair["tokens"])
            parts.append((places, chunk, found))
    scores: list[list[float]] = [[] for _ in words]
    for places, chunk, found in parts:
        for row, score in zip(chunk.row[: chunk.used], jax.device_get(found), strict=False):
            scores[places[row]].append(score.item())
    _check_finite(task, scores)
    if evaluator.config.rank_score == "mean":
        return [
            [score / len(ids) for score, ids in zip(one, row, strict=True)]
            for one, row in zip(scores, words, strict=True)
        ]
    return scores


def _check_finite(task: EvalTask, scores: Sequence[Sequence[float]]) -> None:
    flat = [score for row in scores for score in row]
    bad = int((~np.isfinite(flat)).sum())
    if bad:
        raise FloatingPointError(
            f"{task.name}: {bad} of {len(flat)} log probabilities are not finite, so nothing can "
            "be ranked. Try DTYPE = 'float32', or another prompt."
        )
