"""Rank classification: the log probability of every label word of every row.

A row is encoded once, whatever the number of its words. Rows may have different words, as ReCoRD's
have their entities. Pairs of a row and a word are therefore packed into chunks of one size, so that
a task is compiled once for each width of its inputs and words. Each data-parallel device ranks the
words of its own rows, so encoded rows are never sent to another device. `evaluate.py` calls this.
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
from prompt_tuning.model.loss import NotRankableError
from prompt_tuning.tasks.eval_task import EvalTask

Ids = tuple[int, ...]
Pair = tuple[int, Ids]  # a row of a batch, and one of its words
MOST_WORDS = 4  # a chunk holds this many words for each row of a batch, or all of one row's


class Chunk(NamedTuple):
    """Pairs of a row and one of its words, C for each of G equal parts of a batch.

    Unused pairs are row 0 with no tokens.
    """

    row: Int32[np.ndarray, "G C"]  # counted within the part
    tokens: Int32[np.ndarray, "G*C L"]
    used: list[tuple[int, int]]  # (index of the pair in the chunk, its row in the batch)


def word_ids(task: EvalTask) -> list[list[Ids]]:
    """The tokens of every word of every row, end-of-sequence included.

    Raises:
      ConfigError: a row has no words, or a word has no tokens.
    """
    feature = task.task.output_features["targets"]
    end = (feature.vocabulary.eos_id,) if feature.add_eos else ()
    cache: dict[str, Ids] = {}
    ids = []
    for row in range(len(task.rows)):
        words = task.words(row)
        for word in words:
            if word not in cache:
                cache[word] = (*map(int, feature.vocabulary.encode(word)), *end)
        if not words or not all(cache[word] for word in words):
            raise ConfigError(
                f"row {row} of {task.name} cannot be ranked: its words are {words!r}. Expected at "
                "least one word, and none empty. Set EVAL_METHOD = 'generate'."
            )
        ids.append([cache[word] for word in words])
    return ids


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the pairs of a batch are packed."""

    parts: int  # data-parallel devices
    rows: int  # rows of a batch in each part
    size: int  # pairs of each part in a chunk
    longest: int  # tokens of the longest word; a chunk is padded to one of a few widths

    def chunks(self, words: Sequence[Sequence[Ids]]) -> Iterator[Chunk]:
        """Chunks with all pairs of a batch; the pairs of a row share a chunk."""
        starts = range(0, len(words), self.rows)
        packed = [self._pack(enumerate(words[s : s + self.rows], s)) for s in starts]
        for pairs in itertools.zip_longest(*packed, fillvalue=()):
            yield self._chunk(pairs)

    def _pack(self, words: Iterable[tuple[int, Sequence[Ids]]]) -> Iterator[list[Pair]]:
        """The pairs of one part, for each chunk."""
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


def make_packing(words: Sequence[Sequence[Ids]], batch_size: int, parts: int) -> Packing:
    """A packing whose chunks hold a multiple of a part's rows, and all words of any row.

    >>> make_packing([[(5,), (6,)]] * 9, 8, parts=2)
    Packing(parts=2, rows=4, size=8, longest=1)
    >>> make_packing([[(5,)] * 50], 8, parts=1).size
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
    packing = make_packing(words, evaluator.batch_size, evaluator.mesh.shape["data"])
    dispatched = []
    for tokens, places in evaluator.batches(task.rows):
        encoded = evaluator.encode(*params, tokens)
        for chunk in packing.chunks([words[place] for place in places]):
            pair = evaluator.place(row=chunk.row, tokens=chunk.tokens)
            values = evaluator.score_pairs(*params, encoded, pair["row"], pair["tokens"])
            dispatched.append((places, chunk, values))
    scores: list[list[float]] = [[] for _ in words]
    for places, chunk, values in dispatched:
        values = jax.device_get(values)
        for index, row in chunk.used:
            scores[places[row]].append(values[index].item())
    _check_finite(task, scores)
    if evaluator.config.rank_score == "mean":
        return [
            [score / len(ids) for score, ids in zip(row_scores, row_words, strict=True)]
            for row_scores, row_words in zip(scores, words, strict=True)
        ]
    return scores


def _check_finite(task: EvalTask, scores: Sequence[Sequence[float]]) -> None:
    flat = [score for row in scores for score in row]
    bad = int((~np.isfinite(flat)).sum())
    if bad:
        raise NotRankableError(
            f"{task.name}: {bad} of {len(flat)} log probabilities are not finite. Try "
            "DTYPE = 'float32', or another prompt."
        )
