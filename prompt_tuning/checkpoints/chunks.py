"""What TensorStore does not check of a zarr array: absurd chunks, and the ends of gzipped ones.

`checkpoints/layouts.py` calls this for every array that it opens. TensorStore stops reading a
gzipped chunk once it has its numbers, so it notices neither a missing end nor a wrong checksum.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from prompt_tuning.config import ConfigError

LARGE = 2**26  # bytes of a chunk beyond which it has to be a part of its array


def check_chunks(store: ts.TensorStore, what: str, *, contents: bool = False) -> None:
    """Returns if the chunks of an opened array are of a size to be read, and their files whole.

    With `contents` every chunk is unpacked and held against its checksum.

    Raises:
      ConfigError: names the array and the file.
    """
    sides = [side or 1 for side in store.chunk_layout.read_chunk.shape or ()]
    size = math.prod(sides) * store.dtype.numpy_dtype.itemsize
    whole = math.prod(store.shape) * store.dtype.numpy_dtype.itemsize
    if size > LARGE and size > 2 * whole:
        raise ConfigError(
            f"cannot read {what}: it declares chunks of {size} bytes for an array of {whole}. The "
            "checkpoint is damaged, or was made to do harm: take another copy."
        )
    for file in _gzipped_chunks(store):
        if reason := _fault(file, size, contents):
            raise ConfigError(
                f"cannot read {what}: {reason} in {file}. The checkpoint is damaged, or was copied "
                "incompletely: copy it again."
            )


def _gzipped_chunks(store: ts.TensorStore) -> Iterator[Path]:
    """The files of an array that lies on a local disk in gzipped chunks."""
    spec: dict[str, Any] = store.spec().to_json()
    compressor = spec.get("metadata", {}).get("compressor") or {}
    place = spec.get("kvstore", {})
    if spec.get("driver") != "zarr" or place.get("driver") != "file":
        return
    if not isinstance(compressor, dict) or compressor.get("id") != "gzip":
        return
    with os.scandir(place["path"]) as files:
        for file in files:
            if re.fullmatch(r"\d+([./]\d+)*", file.name) and file.is_file():
                yield Path(file.path)


def _fault(file: Path, size: int, contents: bool) -> str:
    """What is wrong with a gzipped chunk; a gzip file ends in the size of what is in it."""
    with file.open("rb") as opened:
        if opened.seek(0, os.SEEK_END) < 18:
            return "the file ends too early"
        opened.seek(-4, os.SEEK_END)
        if int.from_bytes(opened.read(4), "little") != size % 2**32:
            return "the file ends too early, or holds something else"
        if contents:
            opened.seek(0)
            try:
                with gzip.open(opened) as unpacked:
                    left = size
                    while left >= 0 and (part := unpacked.read(2**20)):
                        left -= len(part)  # no more than that is unpacked, whatever is in it
                    if left:
                        return f"it unpacks to other than {size} bytes"
            except (OSError, EOFError, zlib.error):
                return "the checksum differs"
    return ""
