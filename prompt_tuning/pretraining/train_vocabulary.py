"""`t5x train-vocabulary`: a SentencePiece model with T5's special ids, trained on text files.

What it writes is a VOCABULARY like any other; the 100 sentinels follow its last piece.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import writing

EXTRA_IDS = 100
LONGEST = 4000  # bytes of a sentence; SentencePiece leaves out those over 4192, in silence
ASCII = "".join(chr(code) for code in range(33, 127))


def train_pieces(
    texts: Iterable[str], size: int, *, model_type: Literal["unigram", "bpe"] = "unigram"
) -> bytes:
    """The serialized model of `size` pieces, its special ones among them: pad 0, eos 1, unk 2.

    Printable ASCII is covered character by character, so that a text that was not in the corpus has
    ids as well. One thread and no sampling: the same text gives the same file.

    Raises:
      ConfigError: the text is too small for so many pieces, or so few cannot cover it.
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
        said = str(error).strip().splitlines()[-1].split("] ")[-1]
        raise ConfigError(
            f"--size: SentencePiece cannot make {size} pieces of this text ({said}). Give more "
            "text, or another size."
        ) from error
    return model.getvalue()


def cut_sentences(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, long ones cut between words."""
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
    """Trains on the texts and writes the model, whole or not at all.

    Raises:
      ConfigError: see `train_pieces`; or the file cannot be written.
    """
    path = Path(output).expanduser().absolute()
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; give the name of a file, like en.model.")
    if size < 1:
        raise ConfigError(f"--size must be at least 1, found {size}: T5's vocabulary has 32000.")
    model = train_pieces(texts, size, model_type=model_type)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(f"--output: {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(model)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path
