"""seqio's vocabularies: SentencePiece models by path, Hugging Face's, bytes, and the bundled one.

`tasks.py` tokenises with them. Text to ids without TensorFlow is `vocabularies/vocabulary.py`.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import seqio
import tensorflow as tf

from prompt_tuning.config import TINY, ConfigError
from prompt_tuning.vocabularies.tokenizer_json import (
    BYTES,
    find_vocabulary,
    is_cut,
    is_tokenizer_json,
    to_sentencepiece,
)
from prompt_tuning.world import assets

EXTRA_IDS = 100  # T5's sentinels, the last ids of its vocabulary


def load_vocabulary(spec: str) -> seqio.Vocabulary:
    """The vocabulary that `VOCABULARY` names: 'bytes', 'tiny', a SentencePiece model by path, or a
    folder or a tokenizer.json of Hugging Face's.

    Raises:
      ConfigError: the model cannot be read.
    """
    vocabulary = lazy_vocabulary(spec)
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
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"VOCABULARY: the SentencePiece model {path} cannot be read ({first_line(error)}). Without "
        "a network, set VOCABULARY to a local copy of it."
    )


def read_model(spec: str) -> bytes:
    """The SentencePiece model, of which `checkpoint.identity` makes a hash; b"bytes" for bytes.

    Raises:
      ConfigError: the model cannot be read.
    """
    path = _path(spec)
    if path == BYTES:
        return path.encode()
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            data = file.read()
    except (OSError, tf.errors.OpError) as error:
        raise _unreadable(path, error) from error
    return to_sentencepiece(data, path) if is_tokenizer_json(data) else data


def same_vocabulary(one: seqio.Vocabulary, other: seqio.Vocabulary) -> bool:
    """Whether two vocabularies give the same ids, wherever their files lie.

    seqio calls two SentencePiece vocabularies equal only if their paths are.
    """
    one, other = (v.inner if isinstance(v, SentinelTargets) else v for v in (one, other))
    if isinstance(one, seqio.SentencePieceVocabulary) and isinstance(
        other, seqio.SentencePieceVocabulary
    ):
        return one.sp_model == other.sp_model
    return one == other


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


def lazy_vocabulary(spec: str) -> seqio.Vocabulary:
    """The vocabulary; a remote model is not touched before it is used."""
    path = _path(spec)
    if path == BYTES:
        return seqio.ByteVocabulary()
    if _is_json(path):
        path = _converted(path)
    return seqio.SentencePieceVocabulary(path, extra_ids=_missing_sentinels(path))


def _path(spec: str) -> str:
    return assets.tiny_vocabulary() if spec == TINY else find_vocabulary(spec)


def _is_json(path: str) -> bool:
    """A remote file is judged by its name: it is not touched before it is used."""
    if "://" in path or not Path(path).is_file():
        return path.endswith(".json")
    with Path(path).open("rb") as file:
        return is_tokenizer_json(file.read(16))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vocabularies-")  # gone with the process


def _converted(path: str) -> str:
    """A file of the SentencePiece model that a tokenizer.json means: seqio reads nothing else.

    The same model has the same file, so that seqio's vocabularies of it are equal.
    """
    model = read_model(path)
    file = Path(_folder().name) / f"{hashlib.sha256(model).hexdigest()}.model"
    if not file.exists():
        file.write_bytes(model)
    return str(file)


def _missing_sentinels(path: str) -> int:
    """How many sentinels seqio has to add: none where the model brings them along.

    The official file, `cc_all.32000.100extra`, does (T5X reads it with extra_ids=0), and its copies
    with 32,000 pieces do not. A remote file is judged by its name.
    """
    if "://" in path:
        return 0 if "100extra" in path else EXTRA_IDS
    if not Path(path).is_file():
        raise ConfigError(
            f"VOCABULARY: there is no SentencePiece model {path!r}. Set VOCABULARY to the path of "
            f"one (local or gs://), a Hugging Face folder, 'bytes' or '{TINY}'."
        )
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
        if is_cut(Path(path).read_bytes()):
            raise RuntimeError("the file ends too early: copy it again")
    except RuntimeError as error:
        raise ConfigError(
            f"VOCABULARY: {path} is no SentencePiece model ({_plain(error)}). Give the path of "
            f"one, a Hugging Face folder, 'bytes' or '{TINY}'."
        ) from error
    pieces = ("<extra_id_0>", "\u2581<extra_id_0>")
    has = any(model.piece_to_id(piece) != model.unk_id() for piece in pieces)
    return 0 if has else EXTRA_IDS


def _plain(error: Exception) -> str:
    """SentencePiece's words without the names of its classes and status codes."""
    return "it cannot be parsed" if "ModelProto" in str(error) else first_line(error)


def first_line(error: Exception) -> str:
    """What an error says, without the pages that TensorFlow adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
