"""The documents of a corpus as token ids: text files, a TFDS data set, or the user's seqio task.

What a pre-training run reads, once, into memory; `pretraining/examples.py` comes after.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Iterator

from prompt_tuning.config import ConfigError, CorpusConfig, DataConfig
from prompt_tuning.data import sources, tasks
from prompt_tuning.data.vocabulary import load_vocabulary

HELD_OUT = 100  # without files of its own, every so many documents one is kept for evaluation
Tokens = list[list[int]]


def load_documents(
    corpus: CorpusConfig, data: DataConfig, *, limit: int | None = None
) -> tuple[str, Tokens, Tokens]:
    """A name of the corpus, and its documents to train on and to evaluate on, without EOS.

    With a `limit` only so many documents of the second kind.

    Raises:
      ConfigError: the corpus is not named or not there, or it has no text.
    """
    vocabulary = load_vocabulary(data.vocabulary)
    splits = (data.train_split, data.eval_split)

    def encode(texts: Iterator[str]) -> Tokens:
        found = (vocabulary.encode(text) for text in texts)
        return [list(ids) for ids in found if len(ids)]

    if corpus.tfds:
        train, held_out = (
            encode(sources.read_tfds(corpus.tfds, split, corpus.field, data.tfds_data_dir))
            for split in splits
        )
        return corpus.tfds, *_checked(train, held_out, limit)
    if corpus.files:
        documents = encode(read_texts(corpus.files, corpus))
        if corpus.eval_files:
            held_out = encode(read_texts(corpus.eval_files, corpus, macro="EVAL_TEXT_FILES"))
        else:
            documents, held_out = _hold_out(documents)
        return _short_name(corpus.files), *_checked(documents, held_out, limit)
    if not data.names or not data.names[0]:
        raise ConfigError(
            "there is no corpus: set TEXT_FILES, TFDS_CORPUS, or MIXTURE_OR_TASK_NAME (a seqio "
            "task whose targets are the text)."
        )
    tasks.register(data.vocabulary, tfds_data_dir=data.tfds_data_dir)
    if data.mixture_or_task_module:
        tasks.import_task_module(data.mixture_or_task_module)
    task = tasks.resolve(data.names[0])
    train, held_out = (sources.read_text_task(task, split, vocabulary) for split in splits)
    return data.names[0], *_checked(train, held_out, limit)


def _checked(documents: Tokens, held_out: Tokens, limit: int | None) -> tuple[Tokens, Tokens]:
    for what, found in (("train on", documents), ("evaluate on", held_out)):
        if not any(len(ids) > 1 for ids in found):
            raise ConfigError(
                f"the corpus has no text to {what}: {len(found)} documents, none of more than one "
                "token. Check TEXT_FILES, DOCUMENTS and VOCABULARY, or the splits."
            )
    return documents, held_out[:limit]


def _hold_out(documents: Tokens) -> tuple[Tokens, Tokens]:
    if len(documents) < 2:
        raise ConfigError(
            f"TEXT_FILES have {len(documents)} documents, so none can be held out for evaluation: "
            "give EVAL_TEXT_FILES, or cut the text into more of them (DOCUMENTS = 'paragraph')."
        )
    step = min(HELD_OUT, len(documents))
    held_out = documents[step - 1 :: step]
    return [ids for i, ids in enumerate(documents) if (i + 1) % step], held_out


def _short_name(files: str | tuple[str, ...]) -> str:
    first = files if isinstance(files, str) else files[0]
    return re.sub(r"[^\w.-]+", "_", os.path.basename(first)).strip("_") or "corpus"


# Text files -------------------------------------------------------------------------------------


def find_files(patterns: str | tuple[str, ...], macro: str = "TEXT_FILES") -> list[str]:
    """The files that names and patterns stand for, each once, in the order of their names.

    Raises:
      ConfigError: a pattern stands for none.
    """
    found: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        path = os.path.expanduser(pattern)
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if os.path.isfile(path):
            files = [path]
        if not files:
            raise ConfigError(
                f"{macro}: no file matches {pattern!r} in {os.getcwd()}. It is a path, a pattern "
                "such as 'corpus/*.txt', or a list of them."
            )
        found += files
    return list(dict.fromkeys(found))


def read_texts(
    patterns: str | tuple[str, ...], corpus: CorpusConfig, macro: str = "TEXT_FILES"
) -> Iterator[str]:
    """The documents of text files: of `.jsonl` a line's field, else what DOCUMENTS says.

    Raises:
      ConfigError: a file is not there, is not UTF-8, or a line of JSON lacks the field.
    """
    for path in find_files(patterns, macro):
        try:
            opener = gzip.open if path.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8-sig") as file:
                text = file.read()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"{macro}: {path} cannot be read as UTF-8 text: {error}.") from error
        if re.search(r"\.(jsonl|json)(\.gz)?$", path):
            yield from _json_texts(path, text, corpus.field)
        else:
            yield from split_documents(text, corpus.documents)


def split_documents(text: str, kind: str) -> list[str]:
    r"""The documents of a text; a paragraph ends at an empty line.

    >>> split_documents("one\ntwo\n\nthree\n", "paragraph")
    ['one\ntwo', 'three']
    """
    if kind == "file":
        parts = [text]
    else:
        parts = text.splitlines() if kind == "line" else re.split(r"\n[^\S\n]*\n\s*", text)
    return [part.strip() for part in parts if part.strip()]


def _json_texts(path: str, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: this is not JSON ({error}).") from error
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise ConfigError(
                f"{path}, line {number}: the field {field!r} (TEXT_FIELD) must be text, found "
                f"{value!r:.80}."
            )
        if value.strip():
            yield value
