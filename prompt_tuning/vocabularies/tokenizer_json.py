"""Hugging Face's vocabularies: a tokenizer.json becomes the SentencePiece model it was made of.

T5 was trained with SentencePiece, so its ids are SentencePiece's. Hugging Face's own library gives
other ids in places (docs/prompts.md lists them). Tokens that a folder adds to its model are
refused. `vocabulary.py` calls this module.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import describe_lfs_pointer

TOKENIZER = "tokenizer.json"
SHOWN = 10  # tokens in a message
_SPECIAL = ("<pad>", "</s>", "<unk>")
_SENTINEL = re.compile("\u2581?(<extra_id_[0-9]+>)")
# Steps of a tokenizer.json that SentencePiece's own normalizer performs.
_NORMALIZERS = {"Precompiled", "Replace", "Strip", "Prepend"}
_PRE_TOKENIZERS = {"WhitespaceSplit", "Metaspace"}
# protobuf makes the class when it is imported: type checkers do not see it.
ModelProto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009


def is_tokenizer_json(data: bytes) -> bool:
    """Whether a file's contents are JSON; a SentencePiece model begins with a newline."""
    return data[:1] == b"{" or data.lstrip()[:1] == b"{"


def to_sentencepiece(data: bytes, where: str | Path) -> bytes:
    """The SentencePiece model of a tokenizer.json: the same pieces, scores and normalisation.

    Raises:
      ConfigError: it is damaged, or of another kind than T5's.
    """
    tokenizer = parse_json(data, where)
    try:
        pieces = _pieces(tokenizer, where)
        model = ModelProto()
        for number, (piece, score) in enumerate(pieces):
            model.pieces.add(piece=_spelled(piece), score=score, type=_kind(number, piece))
        _describe(model, tokenizer, where)
        return model.SerializeToString()
    except ConfigError:  # it is a ValueError too
        raise
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise ConfigError(
            f"VOCABULARY: {where} is not a tokenizer.json of T5's kind, or it is damaged "
            f"({type(error).__name__}: {error}). Copy it again."
        ) from error


def parse_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """The object that a file of Hugging Face's holds.

    Raises:
      ConfigError: it is not JSON, or no object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = describe_lfs_pointer(where) or f"{where} is not JSON: {error}. Copy it again."
        raise ConfigError(f"VOCABULARY: {problem}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"VOCABULARY: {where} must hold a JSON object.")
    return value


def _pieces(tokenizer: Mapping[str, Any], where: str | Path) -> list[tuple[str, float]]:
    """All pieces in the order of their ids, with the tokens that were added behind them."""
    model = tokenizer["model"]
    if model.get("type") != "Unigram" or model.get("byte_fallback"):
        kind = "Unigram with bytes" if model.get("type") == "Unigram" else model.get("type")
        raise ConfigError(
            f"VOCABULARY: {where} is a tokenizer of another kind than T5's: expected a Unigram "
            f"model, found {kind}. Give the SentencePiece model (spiece.model) if there is one."
        )
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    if tuple(piece for piece, _ in pieces[:3]) != _SPECIAL or model["unk_id"] != 2:
        raise ConfigError(
            f"VOCABULARY: the first pieces of {where} must be {', '.join(_SPECIAL)}, as T5's are; "
            f"found {', '.join(piece for piece, _ in pieces[:3])}."
        )
    added = sorted((token["id"], token["content"]) for token in tokenizer.get("added_tokens") or [])
    _refuse_added(
        {c: n for n, c in added if c not in _SPECIAL and not _SENTINEL.fullmatch(c)}, where
    )
    for number, content in added:
        if number == len(pieces):
            pieces.append((content, 0.0))
        elif number > len(pieces) or not _same(pieces[number][0], content):
            raise ConfigError(
                f"VOCABULARY: {where} adds the token {content!r} as number {number}, which is not "
                f"the next one after {len(pieces)} pieces, nor the name of the piece there."
            )
    return pieces


def check_added_tokens(folder: Path, model: Any) -> None:
    """Checks that a Hugging Face folder adds no tokens to its SentencePiece `model`.

    Special pieces and sentinels are no additions if transformers has the model's ids for them.

    Raises:
      ConfigError: it does, in one of its files, or a file is damaged.
    """
    pieces = {piece.piece: (number, piece.type) for number, piece in enumerate(model.pieces)}
    others = {}
    for token, number in _read_added(folder).items():
        ours, kind = pieces.get(_spelled(token), pieces.get(token, (None, None)))
        is_special = _SENTINEL.fullmatch(token) or kind != ModelProto.SentencePiece.NORMAL
        if ours is None or not is_special or number not in (None, ours):
            others[token] = number
    _refuse_added(others, folder)


def _read_added(folder: Path) -> dict[str, int | None]:
    """The tokens that the files of a folder add, and the ids that they state."""
    files = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", TOKENIZER)
    parts = [
        parse_json((folder / name).read_bytes(), folder / name) if (folder / name).is_file() else {}
        for name in files
    ]
    *lists, added, tokenizer = parts
    tokens: dict[str, int | None] = {}
    try:
        for part in lists:
            for key in ("additional_special_tokens", "extra_special_tokens"):
                listed = part.get(key) or []
                values = listed.values() if isinstance(listed, Mapping) else listed
                tokens |= dict.fromkeys(map(_content, values))
            decoder = part.get("added_tokens_decoder") or {}
            tokens |= {_content(token): int(number) for number, token in decoder.items()}
        tokens |= {token: int(number) for token, number in added.items()}
        listed = tokenizer.get("added_tokens") or []
        return tokens | {_content(token): int(token["id"]) for token in listed}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"VOCABULARY: the added tokens of {folder} cannot be read from {', '.join(files)} "
            f"({type(error).__name__}: {error}). Copy these files again."
        ) from error


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _refuse_added(tokens: Mapping[str, int | None], where: str | Path) -> None:
    if not tokens:
        return
    shown = [f"{t!r}" if n is None else f"{t!r} ({n})" for t, n in list(tokens.items())[:SHOWN]]
    more = f" and {len(tokens) - len(shown)} more" if len(tokens) > len(shown) else ""
    raise ConfigError(
        f"VOCABULARY: {where} adds tokens to its SentencePiece model: {', '.join(shown)}{more}. "
        "Added tokens are not supported: transformers cuts a text at them, which gives other ids "
        "than SentencePiece. Expected a tokenizer without them. If your rows need none of these "
        "tokens, name the SentencePiece model alone: VOCABULARY = '.../spiece.model'."
    )


def _same(piece: str, content: str) -> bool:
    return _spelled(piece) == _spelled(content)


def _spelled(piece: str) -> str:
    """The piece as SentencePiece has it: T5's sentinels begin a word."""
    sentinel = _SENTINEL.fullmatch(piece)
    return f"\u2581{sentinel.group(1)}" if sentinel else piece


def _kind(number: int, piece: str) -> int:
    kinds = ModelProto.SentencePiece
    if number < len(_SPECIAL):
        return kinds.UNKNOWN if piece == "<unk>" else kinds.CONTROL
    return kinds.USER_DEFINED if _SENTINEL.fullmatch(piece) else kinds.NORMAL


def _describe(model: Any, tokenizer: Mapping[str, Any], where: str | Path) -> None:
    """SentencePiece's settings: T5's are its defaults, but for the ids and the normalisation."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = _SPECIAL
    normalizer.name = "identity"
    for step in _steps(tokenizer.get("normalizer"), "normalizers", _NORMALIZERS, where):
        if step["type"] == "Precompiled":
            normalizer.name = "precompiled"
            text = step["precompiled_charsmap"]
            normalizer.precompiled_charsmap = base64.b64decode(text, validate=True)
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers", _PRE_TOKENIZERS, where)
    for step in steps:
        if step["type"] == "Metaspace":
            never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
            normalizer.add_dummy_prefix = not never


def _steps(
    part: Mapping[str, Any] | None, several: str, known: set[str], where: str | Path
) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, each of which SentencePiece has as well."""
    if part is None:
        return []
    steps = list(part[several]) if part["type"] == "Sequence" else [part]
    others = [step["type"] for step in steps if step["type"] not in known]
    if others:
        raise ConfigError(
            f"VOCABULARY: {where} treats text in a way that T5's SentencePiece does not: "
            f"{', '.join(others)}. Give the SentencePiece model (spiece.model) if there is one."
        )
    return steps
