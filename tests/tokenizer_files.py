"""A tokenizer.json as transformers 5 writes it for a T5, made of a SentencePiece model."""

import base64
import json
from pathlib import Path
from typing import Any

from prompt_tuning.vocabularies.tokenizer_json import ModelProto

EXTRA_IDS = 100


def make_tokenizer_json(model: bytes) -> dict[str, Any]:
    proto = ModelProto.FromString(model)
    vocab = [[piece.piece, piece.score] for piece in proto.pieces]
    vocab += [[f"<extra_id_{number}>", 0.0] for number in reversed(range(EXTRA_IDS))]
    special = [0, 1, 2, *range(len(vocab) - EXTRA_IDS, len(vocab))]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    metaspace = {"replacement": "\u2581", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": vocab[number][0], "special": True, **plain}
            for number in special
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **metaspace}],
        },
        "decoder": {"type": "Metaspace", **metaspace},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }


def write_tokenizer_json(folder: Path, pieces: bytes, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {**make_tokenizer_json(pieces), **changes}
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False))
    return folder / "tokenizer.json"
