"""Text to ids and back without TensorFlow or seqio, to the same ids as theirs.

Everything that VOCABULARY may name is read here. `tasks/vocabulary.py` hands the same model to
seqio, which tokenises in TensorFlow: `tests/test_serving_vocabulary.py` holds the two against each
other.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece
from google.protobuf.message import DecodeError

from prompt_tuning.config import OFFICIAL_VOCABULARY, TINY, ConfigError
from prompt_tuning.runtime import hub
from prompt_tuning.runtime.storage import describe_lfs_pointer, open_folder
from prompt_tuning.vocabularies.identity import vocabulary_identity
from prompt_tuning.vocabularies.tokenizer_json import (
    TOKENIZER,
    ModelProto,
    check_added_tokens,
    is_tokenizer_json,
    parse_json,
    to_sentencepiece,
)
from prompt_tuning.world import assets

BYTES = "bytes"
PAD_ID, EOS_ID = 0, 1
EXTRA_IDS = 100  # T5's sentinels, the last ids of its vocabulary
# The files of a Hugging Face folder.
_MODELS = ("spiece.model", "sentencepiece.model")
_CONFIG = "tokenizer_config.json"
_SPECIAL_IDS = 3  # padding, end-of-sequence, unknown: the first ids of both kinds
_BYTES = 256


@runtime_checkable
class Vocabulary(Protocol):
    """Text to ids and back; both kinds below are one."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, sentinels included."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""
        ...

    @property
    def unk_id(self) -> int:
        """The id of the piece that stands for unknown characters."""
        ...

    @property
    def sha256(self) -> str:
        """The fingerprint of the vocabulary that a prompt stores."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-sequence."""
        ...

    def lost(self, text: str) -> list[str]:
        """The parts of a text that the unknown piece stands for."""
        ...

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the byte of the text (UTF-8) behind its piece."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end-of-sequence; padding is left out."""
        ...

    def piece(self, number: int) -> str:
        """The piece of an id."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePieceVocabulary:
    """A SentencePiece model and its sentinels, as seqio's class of the same name."""

    processor: sentencepiece.SentencePieceProcessor = dataclasses.field(repr=False)
    model: bytes = dataclasses.field(repr=False)  # with the sentinels
    sha256: str  # vocabulary_identity
    file: str  # the SentencePiece model it was read from; "": it was made of a tokenizer.json
    extra_ids: int  # the sentinels that the file does not have

    @property
    def vocab_size(self) -> int:
        """How many ids there are, sentinels included."""
        return self.processor.vocab_size()

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""
        return self.processor.eos_id()

    @property
    def unk_id(self) -> int:
        """The id of the piece that stands for unknown characters."""
        return self.processor.unk_id()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-sequence; `<extra_id_0>` is the last of all ids."""
        return self.processor.encode(text)

    def lost(self, text: str) -> list[str]:
        """The parts of a text that the unknown piece stands for."""
        lost, surface = [], ""
        for piece in reversed(self.processor.encode(text, return_type="proto").pieces):
            # Of a character that becomes several pieces, as a fraction does, the last one has it.
            surface = piece.surface or surface
            if piece.id == self.unk_id:
                lost.append(surface.strip())
        return lost[::-1]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the byte of the text (UTF-8) behind its piece."""
        pieces = self.processor.encode(text, return_type="proto").pieces
        return [piece.id for piece in pieces], [piece.end for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end-of-sequence; ids beyond the vocabulary are unknown.

        A model may have more embeddings than the vocabulary has ids (T5 1.1: 32128 and 32100), so
        such ids can be generated.
        """
        size, unknown = self.vocab_size, self.processor.unk_id()
        known = [unknown if i >= size else int(i) for i in ids]
        return self.processor.decode(_until(self.eos_id, known))

    def piece(self, number: int) -> str:
        """The piece of an id; a word begins with \u2581."""
        return self.processor.id_to_piece(number)


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """UTF-8 bytes behind the three special ids, as seqio's class of the same name."""

    vocab_size: int = _SPECIAL_IDS + _BYTES
    eos_id: int = EOS_ID
    unk_id: int = 2
    sha256: str = vocabulary_identity(BYTES.encode())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-sequence.

        >>> ByteVocabulary().encode("hé")
        [107, 198, 172]
        """
        return [byte + _SPECIAL_IDS for byte in text.encode("utf-8")]

    def lost(self, text: str) -> list[str]:
        """Nothing: every text is bytes."""
        return []

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the byte of the text (UTF-8) behind it."""
        ids = self.encode(text)
        return ids, list(range(1, len(ids) + 1))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end-of-sequence; bytes that are not UTF-8 are left out.

        >>> ByteVocabulary().decode([107, 198, 172, 258, 0, 1, 107])
        'hé'
        """
        values = [int(i) - _SPECIAL_IDS for i in _until(self.eos_id, list(ids))]
        data = bytes(value for value in values if 0 <= value < _BYTES)
        return data.decode("utf-8", errors="ignore")

    def piece(self, number: int) -> str:
        """The byte, as a character where ASCII prints it.

        >>> [ByteVocabulary().piece(i) for i in (1, 107, 198)]
        ['</s>', 'h', '0xC3']
        """
        if number < _SPECIAL_IDS:
            return ("<pad>", "</s>", "<unk>")[number]
        byte = number - _SPECIAL_IDS
        return chr(byte) if 32 < byte < 127 else f"0x{byte:02X}"


def _until(eos_id: int, ids: list[int]) -> list[int]:
    """The ids through the first end-of-sequence, which decodes to nothing."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def find_vocabulary(spec: str) -> str:
    """The file that VOCABULARY names, or 'bytes'.

    'tiny' is bundled; a folder is Hugging Face's, also the one that hf:// downloads.

    In a folder a SentencePiece model is preferred to the tokenizer.json that was made of it. ByT5's
    folder has neither. Anything else is returned as it is.

    Raises:
      ConfigError: the folder holds no vocabulary of these.
    """
    if spec == TINY:
        return assets.tiny_vocabulary()
    is_address = spec.startswith(hub.SCHEME)
    folder = hub.download(spec, hub.VOCABULARY) if is_address else Path(spec).expanduser()
    if not is_address and ("://" in spec or not folder.is_dir()):
        return spec
    for name in (*_MODELS, TOKENIZER):
        if (folder / name).is_file():
            return str(folder / name)
    kind = ""
    if (folder / _CONFIG).is_file():
        kind = str(
            parse_json((folder / _CONFIG).read_bytes(), folder / _CONFIG).get("tokenizer_class")
        )
        if kind.removesuffix("Fast") == "ByT5Tokenizer":
            return BYTES
    names = f" Its {_CONFIG} names {kind}." if kind else ""
    raise ConfigError(
        f"VOCABULARY: the folder {spec!r} cannot be read: it holds none of "
        f"{', '.join((*_MODELS, TOKENIZER))}, and no {_CONFIG} of ByT5's.{names} VOCABULARY is a "
        f"Hugging Face folder of a T5, the path of a SentencePiece model, '{BYTES}' or '{TINY}'."
    )


def load_vocabulary(spec: str) -> Vocabulary:
    """The vocabulary that VOCABULARY names: 'bytes', 'tiny', a SentencePiece model by path, or a
    folder or a tokenizer.json of Hugging Face's.

    T5's 100 sentinels are added if the model has none.

    Raises:
      ConfigError: the model cannot be read, is none, or is not of T5's kind; or a folder adds
        tokens to it.
    """
    path = find_vocabulary(spec)
    if path == BYTES:
        return ByteVocabulary()
    data, file = _read(path), os.path.expanduser(path)
    if is_tokenizer_json(data):
        data, file = to_sentencepiece(data, path), ""
    try:
        model = ModelProto.FromString(data)
        # A file cut between two pieces is a valid model with fewer pieces. The trainer's spec
        # comes after the pieces, so it shows that the file is whole.
        if not model.HasField("trainer_spec"):
            raise RuntimeError("the file ends too early")
        extra_ids = _add_sentinels(model)
        whole = model.SerializeToString(deterministic=True)
        processor = sentencepiece.SentencePieceProcessor(model_proto=whole)
        _check_special_ids(processor, path)
    except (DecodeError, RuntimeError) as error:
        problem = describe_lfs_pointer(file) or (
            f"{path} ({len(data)} bytes) is not a SentencePiece model ({error}). T5's is "
            f"{OFFICIAL_VOCABULARY}; copy it again if this is meant to be it."
        )
        raise ConfigError(f"VOCABULARY: {problem}") from error
    if path not in (spec, assets.tiny_vocabulary()):
        check_added_tokens(Path(path).parent, model)
    return SentencePieceVocabulary(processor, whole, vocabulary_identity(data), file, extra_ids)


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor, path: str) -> None:
    """Raises ConfigError unless 0 is padding, which no text has, and 1 is end-of-sequence."""
    if processor.eos_id() == EOS_ID and processor.is_control(PAD_ID):
        return
    pieces = ", ".join(f"{i} = {processor.id_to_piece(i)}" for i in range(_SPECIAL_IDS))
    raise ConfigError(
        f"VOCABULARY: {path} has other special ids than a T5: expected {PAD_ID} = <pad>, "
        f"{EOS_ID} = </s>, 2 = <unk>; its first pieces are {pieces}. A T5 pads with 0 and ends "
        "an output at 1. Give the vocabulary that the model was trained with; to train a new one, "
        "use `t5x train-vocabulary`, or SentencePiece with pad_id=0, eos_id=1, unk_id=2, bos_id=-1."
    )


def _add_sentinels(model: Any) -> int:
    """The number of sentinels appended, the first sentinel last; 0 if the model has them.

    The official file (cc_all.32000.100extra) has them; copies of the 32,000 plain pieces do not.
    """
    if any(piece.piece.lstrip("\u2581") == "<extra_id_0>" for piece in model.pieces):
        return 0
    for number in reversed(range(EXTRA_IDS)):
        model.pieces.add(
            piece=f"\u2581<extra_id_{number}>",
            score=0.0,
            type=ModelProto.SentencePiece.USER_DEFINED,
        )
    return EXTRA_IDS


def _read(path: str) -> bytes:
    if path.startswith("gs://"):
        return _read_remote(path)
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"VOCABULARY: the SentencePiece model {path!r} cannot be read ({error.strerror}). "
            f"Set VOCABULARY to the path of one (local or gs://), a Hugging Face folder, '{BYTES}' "
            f"or '{TINY}'."
        ) from error


def _read_remote(url: str) -> bytes:
    folder, _, name = url.rpartition("/")
    try:
        data = open_folder(folder).read(name)
        reason = "there is no such file"
    except ConfigError as error:
        # TensorStore's message without the details in brackets.
        data, reason = None, re.split(r" \[", str(error.__cause__ or error))[0]
    if data is not None:
        return data
    public = url.replace("gs://", "https://storage.googleapis.com/", 1)
    raise ConfigError(
        f"VOCABULARY: {url} cannot be read ({reason}). Copy it where a network is, with "
        f"`gsutil cp {url} .` or `curl -O {public}`, and name the copy: "
        f"--gin.VOCABULARY=\"'{name}'\"."
    )
