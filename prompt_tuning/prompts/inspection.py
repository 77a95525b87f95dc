"""Prompt inspection: row norms, nearest vocabulary pieces, label words, similarity of prompts.

The paper's section 7 reads prompts by their nearest neighbours in the vocabulary, by cosine; SPoT
(Vu et al., 2022) finds related tasks by the cosine of their prompts. `t5x inspect-prompt` prints
an `Inspection` and draws it (`picture.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prompt_tuning.checkpoints.huggingface import is_huggingface, local_folder
from prompt_tuning.config import TINY, ConfigError, to_dict
from prompt_tuning.prompts.embedding import EmbeddingTable, open_embedding
from prompt_tuning.prompts.prompt_file import (
    PromptMetadata,
    check_prompt,
    load_prompt,
    read_prompt,
)
from prompt_tuning.vocabularies.vocabulary import Vocabulary, load_vocabulary


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and extremes of some norms."""

    mean: float
    sd: float
    min: float
    max: float


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A piece of the vocabulary near a row."""

    id: int
    piece: str  # the id as text if there is no vocabulary
    cosine: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a prompt, its neighbours nearest first."""

    norm: float
    neighbours: tuple[Neighbour, ...]


@dataclasses.dataclass(frozen=True)
class Label:
    """A label word: how near its embedding is to the rows, and where its pieces are neighbours."""

    word: str
    pieces: tuple[str, ...]
    neighbour_of: tuple[int, ...]  # rows that have a piece of it among their neighbours
    nearest_row: int
    cosine: float  # of that row and the mean of the word's embedded pieces


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a prompt is from its first values, over the rows whose first values are known."""

    rows: int
    relative: float  # |prompt - init| / |init|
    cosine: float  # mean over rows


@dataclasses.dataclass(frozen=True)
class Inspected:
    """One prompt: its numbers and its metadata."""

    name: str
    array: Float[np.ndarray, "P D"]
    metadata: PromptMetadata
    norms: Spread
    rows: tuple[Row, ...]
    labels: tuple[Label, ...]
    distance: Distance | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Several prompts, the vocabulary around them, and how they are related."""

    checkpoint: str
    embeddings: int  # how many were searched
    embedding_norms: Spread
    prompts: tuple[Inspected, ...]
    pooled: Float[np.ndarray, "N N"]  # cosine of the mean-pooled prompts
    pairs: Float[np.ndarray, "N N"]  # mean cosine over all pairs of rows

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, without the arrays of the prompts."""
        names = [prompt.name for prompt in self.prompts]
        prompts = []
        for prompt in self.prompts:
            values = to_dict(prompt)
            del values["array"]
            prompts.append({**values, "shape": list(prompt.array.shape)})
        return {
            "checkpoint": self.checkpoint,
            "embeddings": self.embeddings,
            "embedding_norms": to_dict(self.embedding_norms),
            "prompts": prompts,
            "similarity": {
                "names": names,
                "mean_pooled": self.pooled.tolist(),
                "mean_over_pairs_of_rows": self.pairs.tolist(),
            },
        }


def inspect_prompts(
    paths: Sequence[str | os.PathLike[str]],
    checkpoint: str,
    *,
    vocabulary: str = "",
    label_words: Sequence[str] = (),
    init: str = "",
    neighbours: int = 5,
) -> Inspection:
    """Compares prompts of any form with the embedding table of a checkpoint.

    Without a `vocabulary` pieces are numbers and there are no labels; the bundled checkpoint and
    Hugging Face's folders have their own. Without `label_words` each prompt's own are used. `init`
    is a prompt from which the distance is measured; without it, the distance of rows that began as
    class labels is measured from those.

    Raises:
      ConfigError: something cannot be read, or a prompt does not fit the table or vocabulary.
    """
    if neighbours < 1:
        raise ConfigError(f"the number of neighbours must be at least 1, found {neighbours}.")
    table = open_embedding(checkpoint)
    words = _load_words(vocabulary, checkpoint)
    # Of a shared prompt too: its rows are pieces, whatever they see.
    stored = {str(path): read_prompt(path) for path in paths}
    loaded = {path: (found.prompt, found.metadata) for path, found in stored.items()}
    shape = None, table.shape[1]
    for path, (prompt, metadata) in loaded.items():
        identity = words.sha256 if words else ""
        check_prompt(prompt, metadata, shape=shape, vocabulary=identity, where=path)
    first = np.asarray(load_prompt(init)[0].rows) if init else None
    arrays = {path: np.asarray(prompt.rows) for path, (prompt, _) in loaded.items()}
    limit = min(table.shape[0], words.vocab_size) if words else table.shape[0]
    norms, near = search(table, list(arrays.values()), limit=limit, neighbours=neighbours)
    prompts = []
    for (path, prompt), nearest in zip(arrays.items(), near, strict=True):
        metadata = loaded[path][1] or PromptMetadata()
        rows = _make_rows(prompt, nearest, words)
        labels = tuple(label_words) or metadata.label_words
        described = [_describe_label(word, prompt, rows, table, words) for word in labels if words]
        start = first if first is not None else _label_rows(metadata, table, words)
        prompts.append(
            Inspected(
                path,
                prompt,
                metadata,
                _spread(np.linalg.norm(prompt, axis=1)),
                rows,
                tuple(described),
                _measure(prompt, start, path),
            )
        )
    pooled, pairs = similarities(list(arrays.values()))
    return Inspection(checkpoint, limit, _spread(norms), tuple(prompts), pooled, pairs)


def _load_words(vocabulary: str, checkpoint: str) -> Vocabulary | None:
    """The vocabulary that is named, or the checkpoint's own, if it can be read."""
    if vocabulary or checkpoint == TINY:
        return load_vocabulary(vocabulary or TINY)
    try:
        return (
            load_vocabulary(str(local_folder(checkpoint))) if is_huggingface(checkpoint) else None
        )
    except ConfigError:
        return None


def search(
    table: EmbeddingTable,
    prompts: Sequence[Float[np.ndarray, "P D"]],
    *,
    limit: int,
    neighbours: int,
) -> tuple[Float[np.ndarray, "V"], list[tuple[Int[np.ndarray, "P K"], Float[np.ndarray, "P K"]]]]:
    """The norms of the table's first `limit` rows, and every prompt row's nearest of them.

    One pass over the table, a part at a time: only the best ids and cosines so far are in memory.
    """
    rows = unit(np.concatenate(prompts))
    count = min(neighbours, limit)
    ids = np.zeros((len(rows), 0), np.int64)
    cosines = np.zeros((len(rows), 0), np.float32)
    norms = []
    for start, part in table.chunks(limit):
        norms.append(np.linalg.norm(part, axis=1))
        scores = rows @ unit(part).T
        numbers = np.broadcast_to(np.arange(start, start + len(part)), scores.shape)
        cosines, ids = (
            np.concatenate([cosines, scores], axis=1),
            np.concatenate([ids, numbers], axis=1),
        )
        # Equal cosines in the order of their ids, wherever the parts were cut.
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        cosines, ids = (np.take_along_axis(array, order, axis=1) for array in (cosines, ids))
    ends = np.cumsum([len(prompt) for prompt in prompts])[:-1]
    return np.concatenate(norms), list(
        zip(np.split(ids, ends), np.split(cosines, ends), strict=True)
    )


def unit(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The rows scaled to norm 1; a row of zeros stays zero: its cosine with any row is 0."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def similarities(
    prompts: Sequence[Float[np.ndarray, "P D"]],
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N N"]]:
    """SPoT's two measures between prompts: of their mean rows, and the mean over pairs of rows."""
    means = unit(np.stack([prompt.mean(axis=0) for prompt in prompts]))
    # The mean over pairs of cosines is the product of the mean unit rows.
    units = np.stack([unit(prompt).mean(axis=0) for prompt in prompts])
    return means @ means.T, units @ units.T


def _spread(norms: Float[np.ndarray, "N"]) -> Spread:
    values = norms.mean(), norms.std(), norms.min(), norms.max()
    return Spread(*(float(value) for value in values))


def _make_rows(
    prompt: Float[np.ndarray, "P D"],
    nearest: tuple[Int[np.ndarray, "P K"], Float[np.ndarray, "P K"]],
    vocabulary: Vocabulary | None,
) -> tuple[Row, ...]:
    def neighbour(number: int, cosine: float) -> Neighbour:
        piece = vocabulary.piece(number) if vocabulary else str(number)
        return Neighbour(number, piece, cosine)

    return tuple(
        Row(float(norm), tuple(map(neighbour, ids.tolist(), cosines.tolist())))
        for norm, ids, cosines in zip(np.linalg.norm(prompt, axis=1), *nearest, strict=True)
    )


def _embed_word(
    word: str, table: EmbeddingTable, vocabulary: Vocabulary
) -> tuple[list[int], Float[np.ndarray, "D"]]:
    """The ids of a word, and the mean of their embeddings: a row that begins as it (paper 3.2)."""
    ids = vocabulary.encode(word)
    if not ids:
        raise ConfigError(f"the label word {word!r} has no pieces.")
    return ids, np.concatenate([table.rows(i, i + 1) for i in ids]).mean(axis=0)


def _describe_label(
    word: str,
    prompt: Float[np.ndarray, "P D"],
    rows: Sequence[Row],
    table: EmbeddingTable,
    vocabulary: Vocabulary,
) -> Label:
    ids, embedded = _embed_word(word, table, vocabulary)
    cosines = unit(prompt) @ unit(embedded[None])[0]
    near = [i for i, row in enumerate(rows) if {n.id for n in row.neighbours} & set(ids)]
    pieces = tuple(vocabulary.piece(i) for i in ids)
    best = int(cosines.argmax())
    return Label(word, pieces, tuple(near), best, float(cosines[best]))


def _label_rows(
    metadata: PromptMetadata, table: EmbeddingTable, vocabulary: Vocabulary | None
) -> Float[np.ndarray, "L D"] | None:
    """The first rows of a prompt that began as class labels; what followed them was sampled."""
    words = metadata.label_words
    expected = f"class labels {', '.join(map(repr, words))}, then"
    began_so = metadata.method == "prompt_tuning" and metadata.init.startswith(expected)
    if vocabulary is None or not words or not began_so:
        return None
    return np.stack([_embed_word(word, table, vocabulary)[1] for word in words])


def _measure(
    prompt: Float[np.ndarray, "P D"], start: Float[np.ndarray, "L D"] | None, path: str
) -> Distance | None:
    if start is None:
        return None
    if start.shape[1] != prompt.shape[1]:
        raise ConfigError(
            f"--init has width {start.shape[1]}, and the prompt {path} {prompt.shape[1]}."
        )
    rows = min(len(start), len(prompt))
    now, then = prompt[:rows], start[:rows]
    relative = np.linalg.norm(now - then) / max(float(np.linalg.norm(then)), 1e-30)
    return Distance(rows, float(relative), float((unit(now) * unit(then)).sum(axis=1).mean()))


def describe(inspection: Inspection) -> str:
    """The text that `t5x inspect-prompt` prints; `Inspection.to_json` has the same for programs."""
    norms = _norms(inspection.embedding_norms)
    lines = [f"{inspection.checkpoint}: {inspection.embeddings} embeddings, norms {norms}"]
    for prompt in inspection.prompts:
        lines += ["", *_prompt_lines(prompt, inspection.embedding_norms)]
    if len(inspection.prompts) > 1:
        lines += ["", *_similarity_lines(inspection)]
    return "\n".join(lines)


def _norms(spread: Spread) -> str:
    return f"{spread.mean:.2f} (sd {spread.sd:.2f}, {spread.min:.2f} to {spread.max:.2f})"


def _prompt_lines(prompt: Inspected, table: Spread) -> Iterator[str]:
    metadata = prompt.metadata
    facts = [f"float32{list(prompt.array.shape)}", metadata.task, f"step {metadata.step}"]
    if metadata.score is not None:
        facts.append(f"{metadata.score_name} {metadata.score:.1f}")
    yield f"{prompt.name}: {', '.join(fact for fact in facts if fact and fact != 'step 0')}"
    times = prompt.norms.mean / table.mean if table.mean else 0.0
    yield f"norms {_norms(prompt.norms)}: {times:.2f} times the embeddings'"
    if prompt.distance:
        of = f"{prompt.distance.rows} of {len(prompt.rows)} rows"
        yield (
            f"from its beginning ({of}): moved {prompt.distance.relative:.2f} of its length, "
            f"cosine {prompt.distance.cosine:.2f}"
        )
    yield f"{'row':>4} {'norm':>9}  nearest pieces by cosine"
    for number, row in enumerate(prompt.rows):
        near = "  ".join(f"{n.piece} {n.cosine:.2f}" for n in row.neighbours)
        yield f"{number:>4} {row.norm:>9.2f}  {near}"
    shared = Counter(row.neighbours[0].piece for row in prompt.rows if row.neighbours)
    often = [f"{piece} ({count})" for piece, count in shared.most_common(5) if count > 1]
    if often:
        yield f"nearest to several rows: {', '.join(often)}"
    yield from map(_label_line, prompt.labels)


def _label_line(label: Label) -> str:
    rows = ", ".join(map(str, label.neighbour_of[:20]))
    more = ", ..." if len(label.neighbour_of) > 20 else ""
    where = f"among the neighbours of rows {rows}{more}" if rows else "no row's neighbour"
    return (
        f"label {label.word!r} ({' '.join(label.pieces)}): {where}; nearest is row "
        f"{label.nearest_row}, cosine {label.cosine:.2f}"
    )


def _similarity_lines(inspection: Inspection) -> Iterator[str]:
    width = max(len(prompt.name) for prompt in inspection.prompts)
    for title, matrix in (
        ("similarity of the prompts: cosine of their mean rows", inspection.pooled),
        ("mean cosine over all pairs of rows", inspection.pairs),
    ):
        yield title
        for prompt, values in zip(inspection.prompts, matrix, strict=True):
            yield f"{prompt.name:<{width}} " + " ".join(f"{value:>6.3f}" for value in values)
