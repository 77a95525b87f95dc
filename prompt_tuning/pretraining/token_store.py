"""The tokens of a corpus in memory-mapped files, so that a corpus may be larger than the memory.

They are written once, from `documents.py`, into the MODEL_DIR of the run; a resumed run reads them
again. `examples.py` makes examples from them.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prompt_tuning.config import ConfigError
from prompt_tuning.pretraining.examples import Documents
from prompt_tuning.runtime.replace_folder import replace_folder

PARTS = ("train", "held_out")
_INDEX = "corpus.json"
_BLOCK = 1 << 24  # bytes that are hashed at a time


class TokenStore:
    """The training and the held-out documents of a corpus, and a description of its sources."""

    def __init__(self, folder: Path, name: str) -> None:
        """Opens the files that `write` wrote to `folder`.

        Raises:
          ConfigError: they are missing or damaged.
        """
        try:
            self._index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.train, self.held_out = (
                _open(folder, part, self._index[part], title)
                for part, title in zip(PARTS, (name, f"{name}, held out"), strict=True)
            )
            sums = [self._index[part]["sha256"] for part in PARTS]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the tokens in {folder} are missing or damaged ({error}). Remove the folder; the "
                "corpus is then tokenised again."
            ) from error
        self.identity = hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def made_of(self) -> Mapping[str, Any] | None:
        """The description of the corpus's sources that was passed to `write`."""
        return self._index["made_of"]


def write(
    folder: Path,
    documents: Iterable[tuple[bool, Sequence[int]]],
    *,
    vocab_size: int,
    made_of: Mapping[str, Any] | None = None,
) -> None:
    """Writes the documents, (is held out, token ids), atomically.

    An id takes two bytes if the vocabulary is small enough. `made_of` describes the sources of the
    documents, for `TokenStore.made_of`; it must be equal after a round trip through JSON.

    Raises:
      ConfigError: a part has no document of more than one token.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
    with replace_folder(folder) as new:
        files = [(new / f"{part}.tokens").open("wb") for part in PARTS]
        parts = [_Part(file, dtype) for file in files]
        try:
            for is_held_out, ids in documents:
                parts[is_held_out].add(ids)
        finally:
            for file in files:
                file.close()
        index: dict[str, Any] = {"made_of": made_of}
        for name, part, purpose in zip(PARTS, parts, ("train on", "evaluate on"), strict=True):
            part.check(purpose)
            starts = np.cumsum([0, *part.lengths], dtype="<i8")
            (new / f"{name}.starts").write_bytes(starts.tobytes())
            index[name] = part.describe(starts)
        (new / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _Part:
    """One file of tokens while it is written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.lengths = array.array("q")
        self._file, self._dtype, self._digest = file, dtype, hashlib.sha256()

    def add(self, ids: Sequence[int]) -> None:
        if not len(ids):
            return
        data = np.asarray(ids, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.lengths.append(len(ids))

    def check(self, purpose: str) -> None:
        if max(self.lengths, default=0) < 2:
            raise ConfigError(
                f"the corpus has no text to {purpose}: {len(self.lengths)} documents, none with "
                "more than one token. Check TEXT_FILES, DOCUMENTS and VOCABULARY, or the splits."
            )

    def describe(self, starts: np.ndarray) -> dict[str, Any]:
        self._digest.update(starts.tobytes())
        return {
            "dtype": self._dtype.str,
            "documents": len(self.lengths),
            "tokens": int(starts[-1]),
            "sha256": self._digest.hexdigest(),
        }


def _open(folder: Path, part: str, described: Mapping[str, Any], title: str) -> Documents:
    """The documents of a part, memory-mapped.

    Raises:
      ValueError: a checksum differs.
    """
    tokens = np.memmap(folder / f"{part}.tokens", np.dtype(described["dtype"]), mode="r")
    starts = np.frombuffer((folder / f"{part}.starts").read_bytes(), "<i8")
    digest = hashlib.sha256()
    data = tokens.view(np.uint8)
    for begin in range(0, len(data), _BLOCK):
        digest.update(data[begin : begin + _BLOCK].data)
    digest.update(starts.tobytes())
    if digest.hexdigest() != described["sha256"]:
        raise ValueError(f"{part}.tokens or {part}.starts is damaged")
    return Documents(title, tokens, starts)
