"""From documents to the batch of a step: chunks, their corruption, and packed rows.

The tokens of all documents are one array (`token_store.py`). The order and the corruption of chunks
depend only on (seed, epoch, position), the rows of a step only on (seed, step). So a run resumes
without any saved data state. It applies `objectives.py` to each chunk; `run.py` trains on the rows.
"""

from __future__ import annotations

import array
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from prompt_tuning.batches.order import random_words
from prompt_tuning.config import ConfigError, CorpusConfig
from prompt_tuning.pretraining import objectives
from prompt_tuning.pretraining.objectives import Pair, Words

Batch = dict[str, np.ndarray]
# Each use of random words has a stream of its own.
_CHUNK_ORDER, _DOCUMENT_ORDER, _CUTS, _NOISE = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The concatenated token ids of all documents, without EOS; `starts` also has the end."""

    name: str
    tokens: Int[np.ndarray, "total"]
    starts: Int[np.ndarray, "N+1"]

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """How chunks become examples: the objective and the longest inputs and targets."""

    config: CorpusConfig
    inputs: int
    targets: int
    vocab_size: int  # the first sentinel is its last id

    @functools.cached_property
    def chunk(self) -> int:
        """The number of tokens of a whole chunk, the most that fit the inputs."""
        if self.config.objective == "span_corruption":
            return objectives.span_lengths(
                self.inputs, self.config.noise_density, self.config.mean_noise_span_length
            ).tokens
        return self.inputs - 1  # as in T5: a whole chunk and EOS fit the inputs


def make_shape(config: CorpusConfig, lengths: dict[str, int], vocab_size: int) -> Shape:
    """The shape of a run's examples; the length of targets defaults to the least that is needed.

    Raises:
      ConfigError: the inputs are too short for the objective, or the targets for the inputs.
    """
    inputs = lengths["inputs"]
    least, targets = 4, 2
    if config.objective == "prefix_lm":
        least, targets = 3, lengths.get("targets", inputs)
    if inputs < least or targets < 2:
        raise ConfigError(
            f"TASK_FEATURE_LENGTHS {lengths} are too short for OBJECTIVE = {config.objective!r}: "
            f"expected inputs of at least {least} tokens and targets of at least 2."
        )
    if config.objective == "prefix_lm":
        return Shape(config, inputs, targets, vocab_size)
    density, mean_span = config.noise_density, config.mean_noise_span_length
    needed = objectives.span_lengths(inputs, density, mean_span)
    targets = lengths.get("targets", needed.targets)
    if targets < needed.targets:
        raise ConfigError(
            f"TASK_FEATURE_LENGTHS: targets of {targets} tokens are too short. Inputs of {inputs} "
            f"tokens need {needed.targets} (NOISE_DENSITY = {density}, MEAN_NOISE_SPAN_LENGTH = "
            f"{mean_span}). Set {{'inputs': {inputs}, 'targets': {needed.targets}}}, or leave the "
            "targets out."
        )
    return Shape(config, inputs, targets, vocab_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over a corpus: each chunk once, in the random order of the epoch."""

    documents: Documents
    shape: Shape
    starts: Int[np.ndarray, "N"]  # of the chunks, in the text of the epoch
    lengths: Int[np.ndarray, "N"]
    seed: int
    number: int

    def pair(self, place: int) -> Pair:
        """The example at a position of the epoch."""
        chunk = int(self._order[place])
        tokens, config = self._tokens(chunk), self.shape.config
        if config.objective == "prefix_lm":
            return objectives.prefix_lm(tokens, int(self._cuts[chunk]))
        count = objectives.noise_words(len(tokens))
        return objectives.span_corruption(
            tokens,
            _words(self.seed, _NOISE, self.number, count, chunk),
            vocab_size=self.shape.vocab_size,
            density=config.noise_density,
            mean_span=config.mean_noise_span_length,
        )

    @functools.cached_property
    def num_rows(self) -> int:
        """The number of rows of the epoch; packed rows have several examples."""
        return len(self._rows) - 1

    def places(self, row: int) -> range:
        """The positions of a row's examples in the epoch."""
        return range(self._rows[row], self._rows[row + 1])

    def row(self, number: int) -> list[Pair]:
        """The examples of a row."""
        return [self.pair(place) for place in self.places(number)]

    @functools.cached_property
    def _rows(self) -> Int[np.ndarray, "R+1"]:
        """The position of each row's first example, and the end."""
        if not self.shape.config.pack:
            return np.arange(len(self.starts) + 1)
        inputs, targets = self._sizes()
        return _pack(inputs[self._order], targets[self._order], self.shape)

    @functools.cached_property
    def _order(self) -> Int[np.ndarray, "N"]:
        return _permutation(self.seed, _CHUNK_ORDER, self.number, len(self.starts))

    @functools.cached_property
    def _cuts(self) -> Int[np.ndarray, "N"]:
        """The index at which prefix language modelling cuts each chunk."""
        words = _words(self.seed, _CUTS, self.number, len(self.starts)).tolist()
        inputs, targets = self.shape.inputs, self.shape.targets
        cuts = [
            objectives.prefix_cut(length, word, inputs=inputs, targets=targets)
            for length, word in zip(self.lengths.tolist(), words, strict=True)
        ]
        return np.array(cuts)

    def _sizes(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """The lengths of the inputs and the targets of every chunk."""
        config = self.shape.config
        if config.objective == "prefix_lm":
            return self._cuts + 1, self.lengths - self._cuts + 1
        density, mean_span = config.noise_density, config.mean_noise_span_length
        unique, inverse = np.unique(self.lengths, return_inverse=True)
        sizes = [objectives.corrupted_lengths(int(n), density, mean_span) for n in unique]
        inputs, targets = np.array([(n.inputs, n.targets) for n in sizes]).T
        return inputs[inverse], targets[inverse]

    def _tokens(self, chunk: int) -> Int[np.ndarray, "T"]:
        start, stop = self.starts[chunk], self.starts[chunk] + self.lengths[chunk]
        if not self.shape.config.merge_documents:
            return np.asarray(self.documents.tokens[start:stop], np.int32)
        parts = []
        for number, stops in zip(*self._merged_in(start, stop), strict=True):
            begin, end = self.documents.starts[number : number + 2]
            shift = begin - (stops - (end - begin))  # from the epoch's text to the corpus'
            parts.append(self.documents.tokens[max(start + shift, begin) : min(stop + shift, end)])
        return np.concatenate(parts, dtype=np.int32)

    def sources(self, place: int) -> list[int]:
        """The numbers, from 0, of the documents of the example at a position."""
        chunk = int(self._order[place])
        start, stop = self.starts[chunk], self.starts[chunk] + self.lengths[chunk]
        if not self.shape.config.merge_documents:
            return [int(np.searchsorted(self.documents.starts, start, side="right")) - 1]
        return self._merged_in(start, stop)[0].tolist()

    def _merged_in(
        self, start: int, stop: int
    ) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"]]:
        """The documents in a part of the epoch's text, and the end of each in it."""
        order, ends = self._merged
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return order[first : last + 1], ends[first : last + 1]

    @functools.cached_property
    def _merged(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """The documents in the order of the epoch, and the end of each in the epoch's text."""
        order = _permutation(self.seed, _DOCUMENT_ORDER, self.number, len(self.documents))
        return order, np.cumsum(np.diff(self.documents.starts)[order])


class Examples:
    """The endless sequence of a corpus's examples, epoch after epoch."""

    def __init__(self, documents: Documents, shape: Shape, seed: int) -> None:
        """Cuts the documents into chunks.

        Raises:
          ConfigError: the corpus has no chunk of two tokens.
        """
        total = len(documents.tokens)
        begins, lengths = documents.starts[:-1], np.diff(documents.starts)
        if shape.config.merge_documents:
            begins, lengths = np.zeros(1, np.int64), np.array([total])
        starts, sizes = _cut(begins, lengths, shape.chunk)
        if not len(starts):
            raise ConfigError(
                f"the corpus {documents.name} has no text to train on: {len(documents)} "
                f"documents, {total} tokens. Check TEXT_FILES, DOCUMENTS and VOCABULARY."
            )
        self.shape = shape
        self.num_chunks = len(starts)  # of every epoch
        self._fixed = (documents, shape, starts, sizes, seed)
        self._rows_before = [0]  # the number of rows before each epoch so far
        self.epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, number: int) -> Epoch:
        return Epoch(*self._fixed, number)

    def batch(self, step: int, batch_size: int) -> Batch:
        """T5X's arrays of a step; steps count from 0 in this run."""
        positions = range(step * batch_size, (step + 1) * batch_size)
        return self._arrays([self._row(position) for position in positions])

    def batches(self, epoch: int, batch_size: int, *, limit: int | None = None) -> Iterator[Batch]:
        """All rows of an epoch, or the first `limit`, in batches; the last is padded."""
        source = self.epoch(epoch)
        numbers = range(source.num_rows)[:limit]
        for start in range(0, len(numbers), batch_size):
            rows = [source.row(number) for number in numbers[start:][:batch_size]]
            yield self._arrays(rows + [[]] * (batch_size - len(rows)))

    def sources(self, step: int, batch_size: int) -> list[list[int]]:
        """The numbers, from 0, of the documents of each row of a step."""
        rows = map(self._find, range(step * batch_size, (step + 1) * batch_size))
        return [
            sorted({source for place in epoch.places(row) for source in epoch.sources(place)})
            for epoch, row in rows
        ]

    def _row(self, position: int) -> list[Pair]:
        """The examples of a row of the endless sequence."""
        epoch, row = self._find(position)
        return epoch.row(row)

    def _find(self, position: int) -> tuple[Epoch, int]:
        """The epoch of a row, and its number in it; packed epochs differ in their rows."""
        while self._rows_before[-1] <= position:
            rows = self.epoch(len(self._rows_before) - 1).num_rows
            self._rows_before.append(self._rows_before[-1] + rows)
        epoch = int(np.searchsorted(self._rows_before, position, side="right")) - 1
        return self.epoch(epoch), position - self._rows_before[epoch]

    def _arrays(self, rows: Sequence[Sequence[Pair]]) -> Batch:
        shape = self.shape
        return make_arrays(rows, shape.inputs, shape.targets, packed=shape.config.pack)


def _cut(
    begins: Int[np.ndarray, "N"], lengths: Int[np.ndarray, "N"], chunk: int
) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C"]]:
    """The start and the length of every chunk; chunks of a single token are left out."""
    counts = -(-lengths // chunk)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + offsets * chunk
    sizes = np.minimum(np.repeat(lengths, counts) - offsets * chunk, chunk)
    return starts[sizes > 1], sizes[sizes > 1]


def _pack(
    inputs: Int[np.ndarray, "N"], targets: Int[np.ndarray, "N"], shape: Shape
) -> Int[np.ndarray, "R+1"]:
    """The first example of each row, and the end; a row takes examples in order while they fit."""
    begins, used = array.array("q", [0]), (0, 0)
    for place, size in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        total = used[0] + size[0], used[1] + size[1]
        if place > begins[-1] and (total[0] > shape.inputs or total[1] > shape.targets):
            begins.append(place)
            total = size
        used = total
    return np.array([*begins, len(inputs)])


def make_arrays(
    rows: Sequence[Sequence[Pair]], inputs: int, targets: int, *, packed: bool
) -> Batch:
    """T5X's arrays for rows of examples, padded with 0; `packed` adds segments and positions.

    >>> pair = Pair(np.array([5, 1]), np.array([7, 1]))
    >>> batch = make_arrays([[pair, pair]], 5, 4, packed=True)
    >>> batch["encoder_segment_ids"].tolist(), batch["decoder_input_tokens"].tolist()
    ([[1, 1, 2, 2, 0]], [[0, 7, 0, 7]])
    """
    names = ["encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens"]
    if packed:
        names += [f"{side}_{x}" for side in ("encoder", "decoder") for x in _PACKING]
    batch = {
        name: np.zeros((len(rows), inputs if name.startswith("encoder") else targets), np.int32)
        for name in names
    }
    for row, pairs in enumerate(rows):
        at = {"encoder": 0, "decoder": 0}
        for segment, pair in enumerate(pairs, start=1):
            shifted = np.append(0, pair.targets[:-1])  # every example starts with the padding token
            parts = {"encoder": (pair.inputs,), "decoder": (pair.targets, shifted)}
            for side, arrays in parts.items():
                stop = at[side] + len(arrays[0])
                here = (row, slice(at[side], stop))
                for name, ids in zip(_TOKENS[side], arrays, strict=True):
                    batch[name][here] = ids
                if packed:
                    batch[f"{side}_segment_ids"][here] = segment
                    batch[f"{side}_positions"][here] = np.arange(len(arrays[0]))
                at[side] = stop
    weights = (batch["decoder_target_tokens"] > 0).astype(np.float32)
    return batch | {"decoder_loss_weights": weights}


_PACKING = ("segment_ids", "positions")
_TOKENS = {
    "encoder": ("encoder_input_tokens",),
    "decoder": ("decoder_target_tokens", "decoder_input_tokens"),
}


def _words(seed: int, stream: int, epoch: int, count: int, index: int = 0) -> Words:
    return random_words((seed, stream), (epoch, index), count)


def _permutation(seed: int, stream: int, epoch: int, n: int) -> Int[np.ndarray, "n"]:
    return np.argsort(_words(seed, stream, epoch, n), kind="stable")
