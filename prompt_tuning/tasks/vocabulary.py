"""seqio's vocabularies of the models that `vocabularies/vocabulary.py` reads.

seqio's own classes tokenise in TensorFlow's operations, and tasks of users have them too: one made
here goes into a mixture with theirs.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import seqio
import tensorflow as tf

from prompt_tuning.config import ConfigError
from prompt_tuning.vocabularies.vocabulary import (
    EXTRA_IDS,
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    find_vocabulary,
    load_vocabulary,
)


def seqio_vocabulary(spec: str) -> seqio.Vocabulary:
    """Seqio's vocabulary of what VOCABULARY names; a remote model is read at its first use only.

    Raises:
      ConfigError: the model cannot be read, or is none.
    """
    path = find_vocabulary(spec)
    if "://" in path and not path.endswith(".json"):
        # The official file, cc_all.32000.100extra, brings its sentinels along.
        return seqio.SentencePieceVocabulary(path, 0 if "100extra" in path else EXTRA_IDS)
    vocabulary = load_vocabulary(spec)
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary()
    assert isinstance(vocabulary, SentencePieceVocabulary)
    if not vocabulary.file:
        return seqio.SentencePieceVocabulary(_write_model(vocabulary.model))
    return seqio.SentencePieceVocabulary(vocabulary.file, vocabulary.extra_ids)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vocabularies-")  # gone with the process


def _write_model(model: bytes) -> str:
    """A file of the model, since seqio reads nothing else.

    The same model has the same file, so that seqio's vocabularies of it are equal.
    """
    file = Path(_folder().name) / f"{hashlib.sha256(model).hexdigest()}.model"
    if not file.exists():
        file.write_bytes(model)
    return str(file)


def load_seqio_vocabulary(spec: str) -> seqio.Vocabulary:
    """`seqio_vocabulary`, with a remote model read.

    Raises:
      ConfigError: the model cannot be read, or is none.
    """
    vocabulary = seqio_vocabulary(spec)
    read_vocabulary(vocabulary)
    return vocabulary


def read_vocabulary(vocabulary: seqio.Vocabulary) -> None:
    """Makes sure that the model of a vocabulary can be read; seqio does that at first use only.

    Raises:
      ConfigError: it cannot.
    """
    try:
        _ = vocabulary.vocab_size
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        path = getattr(vocabulary, "sentencepiece_model_file", type(vocabulary).__name__)
        raise ConfigError(
            f"VOCABULARY: the SentencePiece model {path} cannot be read ({first_line(error)}). "
            "Without a network, set VOCABULARY to a local copy of it."
        ) from error


def same_vocabulary(of_task: seqio.Vocabulary, vocabulary: Vocabulary) -> bool:
    """Whether a task's vocabulary gives the ids of `vocabulary`, wherever their files lie.

    seqio calls two SentencePiece vocabularies equal only if their paths are.
    """
    inner = of_task.inner if isinstance(of_task, SentinelTargets) else of_task
    if isinstance(vocabulary, SentencePieceVocabulary):
        return (
            isinstance(inner, seqio.SentencePieceVocabulary) and inner.sp_model == vocabulary.model
        )
    return inner == seqio.ByteVocabulary()


class SentinelTargets(seqio.Vocabulary):
    """A vocabulary that begins every text with the first sentinel, and takes it off again.

    For the targets of a task: a model that was pre-trained on span corruption alone has only ever
    answered in that form (the paper's "span corruption + sentinel", 3.3).
    """

    def __init__(self, inner: seqio.Vocabulary) -> None:
        super().__init__(extra_ids=0)
        self.inner = inner

    @property
    def sentinel(self) -> int:
        """T5's first sentinel: the last id."""
        return self.inner.vocab_size - 1

    @property
    def bos_id(self) -> int | None:
        """The inner vocabulary's."""
        return self.inner.bos_id

    @property
    def eos_id(self) -> int | None:
        """The inner vocabulary's."""
        return self.inner.eos_id

    @property
    def unk_id(self) -> int | None:
        """The inner vocabulary's."""
        return self.inner.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.inner.vocab_size

    def _encode(self, s: str) -> list[int]:
        return [self.sentinel, *self.inner.encode(s)]

    def _decode(self, ids: Iterable[int]) -> str:
        values = list(ids)
        return self.inner.decode(values[1:] if values[:1] == [self.sentinel] else values)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = self.inner.encode_tf(s)
        first = tf.fill([1], tf.cast(self.sentinel, ids.dtype))
        return tf.concat([first, ids], axis=0)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda x: self.decode(x.numpy().tolist()), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentinelTargets) and self.inner == other.inner

    def __hash__(self) -> int:
        return id(self.inner)


def target_vocabulary(vocabulary: seqio.Vocabulary, sentinel_targets: bool) -> seqio.Vocabulary:
    """The vocabulary of a task's targets, as SENTINEL_TARGETS says."""
    return SentinelTargets(vocabulary) if sentinel_targets else vocabulary


def first_line(error: Exception) -> str:
    """What an error says, without the pages that TensorFlow adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
