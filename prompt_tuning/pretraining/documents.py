"""The documents of a corpus as token ids: from text files, a TFDS data set, or a seqio task.

They are read one by one, so that a corpus may be larger than the memory. `token_store.py` writes
them to disk.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from prompt_tuning.config import ConfigError, CorpusConfig, DataConfig
from prompt_tuning.runtime.storage import describe_lfs_pointer
from prompt_tuning.tasks import registry, sources
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

HELD_OUT = 100  # without EVAL_TEXT_FILES, one document in this many is held out
Tokens = Sequence[int]


def describe(corpus: CorpusConfig, data: DataConfig) -> tuple[str, dict[str, Any] | None]:
    """The name of the corpus, and what its documents depend on, to notice changes.

    The latter is None for a seqio task: a change of its functions cannot be noticed.

    Raises:
      ConfigError: no corpus is named, or its files are missing.
    """
    if corpus.tfds:
        splits = [data.train_split, data.eval_split]
        version = sources.describe_tfds(corpus.tfds, data.tfds_data_dir)
        return corpus.tfds, {"tfds": version, "splits": splits, "field": corpus.field}
    if corpus.files:
        eval_files = find_files(corpus.eval_files, "EVAL_TEXT_FILES")
        made_of = {
            "files": [_stamp(path) for path in find_files(corpus.files)],
            "eval_files": [_stamp(path) for path in eval_files],
            "field": corpus.field,
            "documents": corpus.documents,
        }
        return _short_name(corpus.files), made_of
    if not data.names or not data.names[0]:
        raise ConfigError(
            "no corpus is named. Set TEXT_FILES, TFDS_CORPUS, or MIXTURE_OR_TASK_NAME (a seqio "
            "task whose targets are the text)."
        )
    return data.names[0], None


def read_documents(corpus: CorpusConfig, data: DataConfig) -> Iterator[tuple[bool, Tokens]]:
    """For every document whether it is held out, and its ids, without EOS.

    Raises:
      ConfigError: the corpus is missing, or cannot be read.
    """
    vocabulary = load_vocabulary(data.vocabulary)
    splits = ((False, data.train_split), (True, data.eval_split))

    def encode(texts: Iterable[str]) -> Iterator[Tokens]:
        encoded = (vocabulary.encode(text) for text in texts)
        return (ids for ids in encoded if len(ids))

    if corpus.tfds:
        for held_out, split in splits:
            texts = sources.read_tfds(corpus.tfds, split, corpus.field, data.tfds_data_dir)
            yield from ((held_out, ids) for ids in encode(texts))
    elif corpus.eval_files:
        yield from ((False, ids) for ids in encode(read_texts(corpus.files, corpus)))
        texts = read_texts(corpus.eval_files, corpus, macro="EVAL_TEXT_FILES")
        yield from ((True, ids) for ids in encode(texts))
    elif corpus.files:
        yield from _hold_out(encode(read_texts(corpus.files, corpus)))
    else:
        registry.register(data.vocabulary, tfds_data_dir=data.tfds_data_dir)
        if data.mixture_or_task_module:
            registry.import_task_module(data.mixture_or_task_module)
        task = registry.resolve(data.names[0])
        for held_out, split in splits:
            rows = sources.read_text_task(task, split, vocabulary)
            yield from ((held_out, ids) for ids in rows)


def _hold_out(documents: Iterator[Tokens]) -> Iterator[tuple[bool, Tokens]]:
    """Marks every hundredth document as held out; if there are fewer, the last."""
    first = list(itertools.islice(documents, HELD_OUT))
    if len(first) < 2:
        raise ConfigError(
            f"TEXT_FILES has {len(first)} documents, so none can be held out for evaluation. Set "
            "EVAL_TEXT_FILES, or cut the text into more documents (DOCUMENTS = 'paragraph')."
        )
    for number, ids in enumerate(itertools.chain(first, documents), start=1):
        yield number % len(first) == 0, ids


def _stamp(path: str) -> list[Any]:
    """The path, size and modification time of a file."""
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def _short_name(files: str | tuple[str, ...]) -> str:
    first = files if isinstance(files, str) else files[0]
    if os.path.basename(first).startswith("*"):  # "novels" for novels/*.txt
        first = os.path.dirname(first) or first
    return re.sub(r"[^\w.-]+", "_", os.path.basename(first)).strip("_") or "corpus"


# Text files -------------------------------------------------------------------------------------


def find_files(patterns: str | tuple[str, ...], macro: str = "TEXT_FILES") -> list[str]:
    """The files that match paths and patterns, each once; those of a pattern are sorted.

    Raises:
      ConfigError: a pattern matches no file.
    """
    paths: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        path = os.path.expanduser(pattern)
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if os.path.isfile(path):
            files = [path]
        if not files:
            raise ConfigError(
                f"{macro}: no file matches {pattern!r} in {os.getcwd()}. Give a path, a pattern "
                "such as 'corpus/*.txt', or a list of them."
            )
        paths += files
    return list(dict.fromkeys(paths))


def read_texts(
    patterns: str | tuple[str, ...], corpus: CorpusConfig, macro: str = "TEXT_FILES"
) -> Iterator[str]:
    """The documents of text files: a field of each line of `.jsonl`, else by DOCUMENTS.

    Raises:
      ConfigError: a file is missing or not UTF-8, or a line of JSON lacks the field.
    """
    for path in find_files(patterns, macro):
        if pointer := describe_lfs_pointer(path):
            raise ConfigError(f"{macro}: {pointer}")
        try:
            with _open(path) as file:
                if re.search(r"\.(jsonl|json)(\.gz)?$", path):
                    yield from _json_texts(path, file, corpus.field)
                else:
                    yield from split_documents(file, corpus.documents)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{macro}: {path} cannot be read as UTF-8 text: {_reason(error)}. Copy it again, "
                "or save it as UTF-8."
            ) from error


def _open(path: str) -> TextIO:
    if not path.endswith(".gz"):
        return open(path, encoding="utf-8-sig")
    return gzip.open(path, "rt", encoding="utf-8-sig")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not valid ({error.reason})"
    return getattr(error, "strerror", None) or str(error).rstrip(".")


def split_documents(lines: Iterable[str], kind: str) -> Iterator[str]:
    r"""The documents of a text, an iterable of lines; a paragraph ends at an empty line.

    >>> list(split_documents(["one\n", "two\n", "\n", "three\n"], "paragraph"))
    ['one\ntwo', 'three']
    """
    if kind == "line":
        parts = iter(lines)
    else:
        ends = str.isspace if kind == "paragraph" else lambda line: False
        parts = ("".join(part) for _, part in itertools.groupby(lines, ends))
    return (part.strip() for part in parts if part.strip())


def _json_texts(path: str, lines: TextIO, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: this is not JSON ({error}). Expected an object in every "
                "line."
            ) from error
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise ConfigError(
                f"{path}, line {number}: the field {field!r} (TEXT_FIELD) is {value!r:.80}. "
                "Expected a text."
            )
        if value.strip():
            yield value
