"""Ranks what a row may be answered with by its probability, every word of a row in one batch.

A row is encoded once, whatever the number of its words. Rows may have different words, as ReCoRD's
have their entities: pairs of a row and a word are packed into chunks of one size, so that a task is
compiled once for each width of its inputs and words. Each data-parallel device ranks the words of
its own rows: what it has computed of a row stays where it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from prompt_tuning.batches.groups import fitting_width, input_widths
from prompt_tuning.config import ConfigError
from prompt_tuning.tasks.eval_task import EvalTask

Ids = tuple[int, ...]
Pair = tuple[int, Ids]  # a row of a batch, and one of its words
MOST_WORDS = 4  # a chunk holds so many words for each row of a batch, or those of one row


class Chunk(NamedTuple):
    """Pairs of a row and one of its words, C of each of G equal parts of a batch.

    What is not used is row 0 with no tokens.
    """

    row: Int32[np.ndarray, "G C"]  # counted within the part
    tokens: Int32[np.ndarray, "G*C L"]
    used: list[tuple[int, int]]  # a place in the chunk, and its row of the batch


class NotRankableError(FloatingPointError):
    """Log probabilities are not finite."""


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


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the pairs of a batch are packed."""

    parts: int  # data-parallel devices, each with as many rows of the batch
    rows: int  # of the batch that a part has
    size: int  # pairs of a part that a chunk holds
    longest: int  # tokens of a word: those of a chunk are padded to one of a few widths

    def chunks(self, words: Sequence[Sequence[Ids]]) -> Iterator[Chunk]:
        """The pairs of a batch of these words, each row's within one chunk."""
        starts = range(0, len(words), self.rows)
        packed = [self._pack(enumerate(words[s : s + self.rows], s)) for s in starts]
        for pairs in itertools.zip_longest(*packed, fillvalue=()):
            yield self._chunk(pairs)

    def _pack(self, words: Iterable[tuple[int, Sequence[Ids]]]) -> Iterator[list[Pair]]:
        """What each chunk holds of a part."""
        pairs: list[Pair] = []
        for row, ids in words:
            if len(pairs) + len(ids) > self.size:
                yield pairs
                pairs = []
            pairs += [(row, tokens) for tokens in ids]
        yield pairs

    def _chunk(self, parts: Sequence[Sequence[Pair]]) -> Chunk:
        widest = max(len(ids) for pairs in parts for _, ids in pairs)
        width = fitting_width(widest, input_widths(self.longest))
        row = np.zeros((self.parts, self.size), np.int32)
        tokens = np.zeros((self.parts * self.size, width), np.int32)
        used = []
        for part, pairs in enumerate(parts):
            for k, (index, ids) in enumerate(pairs):
                row[part, k] = index - part * self.rows
                tokens[part * self.size + k, : len(ids)] = ids
                used.append((part * self.size + k, index))
        return Chunk(row, tokens, used)


def packing(words: Sequence[Sequence[Ids]], batch_size: int, parts: int) -> Packing:
    """Chunks that hold a multiple of a part's rows, and all words of any row.

    >>> packing([[(5,), (6,)]] * 9, 8, parts=2)
    Packing(parts=2, rows=4, size=8, longest=1)
    >>> packing([[(5,)] * 50], 8, parts=1).size
    56
    """
    rows, most = batch_size // parts, max(map(len, words))
    size = rows * min(most, max(MOST_WORDS, -(-most // rows)))
    return Packing(parts, rows, size, max(len(ids) for row in words for ids in row))


def rank(evaluator: Any, params: Any, task: EvalTask) -> list[list[float]]:
    """The score of every word of every row: log p, or its mean over the word's tokens.

    Raises:
      NotRankableError: a score is not a number.
    """
    words = word_ids(task)
    packed = packing(words, evaluator.batch_size, evaluator.mesh.shape["data"])
    parts = []
    for tokens, places in evaluator.batches(task.rows):
        encoded = evaluator.encode(*params, tokens)
        for chunk in packed.chunks([words[place] for place in places]):
            pair = evaluator.place(row=chunk.row, tokens=chunk.tokens)
            found = evaluator.score_pairs(*params, encoded, pair["row"], pair["tokens"])
            parts.append((places, chunk, found))
    scores: list[list[float]] = [[] for _ in words]
    for places, chunk, found in parts:
        found = jax.device_get(found)
        for place, row in chunk.used:
            scores[places[row]].append(found[place].item())
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
        raise NotRankableError(
            f"{task.name}: {bad} of {len(flat)} log probabilities are not finite, so nothing can "
            "be ranked. Try DTYPE = 'float32', or another prompt."
        )
