"""The fingerprint of a vocabulary: a prompt names it and is refused with other vocabularies."""

from __future__ import annotations

import hashlib
import re

import sentencepiece

from prompt_tuning.vocabularies.tokenizer_json import ModelProto


def vocabulary_identity(model: bytes) -> str:
    """The SHA-256, in hexadecimal, of the pieces of a SentencePiece model and of their scores.

    T5's sentinels are left out: the official file has them, copies of its 32,000 plain pieces do
    not, and seqio gives the same ids for both. If the algorithm is not T5's, Unigram, its name is
    hashed too, since the same pieces give other ids. `b"bytes"` is the vocabulary of bytes.

    Raises:
      RuntimeError: it is not a SentencePiece model.
    """
    if model == b"bytes":
        return hashlib.sha256(model).hexdigest()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    digest = hashlib.sha256()
    spec = ModelProto.FromString(model).trainer_spec
    if spec.model_type != spec.UNIGRAM:
        digest.update(f"{spec.ModelType.Name(spec.model_type)}\n".encode())
    for number in range(processor.vocab_size()):
        piece = processor.id_to_piece(number)
        if not re.fullmatch("\u2581?<extra_id_[0-9]+>", piece):
            digest.update(f"{piece}\t{processor.get_score(number):.6g}\n".encode())
    return digest.hexdigest()
