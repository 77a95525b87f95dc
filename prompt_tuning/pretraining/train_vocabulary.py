"""`t5x train-vocabulary`: trains a SentencePiece model with T5's special ids on text files.

The output can be used as VOCABULARY; the 100 sentinels follow its last piece.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import replace_file, writing

EXTRA_IDS = 100
LONGEST = 4000  # bytes of a sentence; SentencePiece silently skips those over 4192
ASCII = "".join(chr(code) for code in range(33, 127))


def train_pieces(
    texts: Iterable[str], size: int, *, model_type: Literal["unigram", "bpe"] = "unigram"
) -> bytes:
    """The serialized model of `size` pieces, including pad 0, eos 1 and unk 2.

    All printable ASCII characters are pieces, so that any ASCII text can be encoded. The model is
    trained with one thread and without sampling, so that the same text gives the same file.

    Raises:
      ConfigError: the text is too small for so many pieces, or has too many characters for so few.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=cut_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            character_coverage=1.0 if model_type == "bpe" else 0.9995,
            required_chars=ASCII,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split("] ")[-1]
        raise ConfigError(
            f"--size: SentencePiece cannot make {size} pieces of this text ({reason}). Give more "
            "text, or another size."
        ) from error
    return model.getvalue()


def cut_sentences(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts; long lines are cut between words."""
    for text in texts:
        for line in text.splitlines():
            words: list[str] = []
            used = 0
            for word in line.split():
                cost = len(word.encode()) + 1
                if words and used + cost > LONGEST:
                    yield " ".join(words)
                    words, used = [], 0
                words.append(word)
                used += cost
            if words:
                yield " ".join(words)


def write_vocabulary(
    texts: Iterable[str], output: str, size: int, *, model_type: Literal["unigram", "bpe"]
) -> Path:
    """The path of the model, trained on the texts and written atomically.

    Raises:
      ConfigError: see `train_pieces`; or the file cannot be written.
    """
    path = Path(output).expanduser().absolute()
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder. Give the name of a file, like en.model.")
    if size < 1:
        raise ConfigError(
            f"--size={size}: expected at least 1. T5's own vocabulary has 32000 pieces."
        )
    model = train_pieces(texts, size, model_type=model_type)
    with writing(f"--output: {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as new:
            new.write_bytes(model)
    return path
