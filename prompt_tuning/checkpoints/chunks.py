"""Checks of a zarr array that TensorStore omits: the size of chunks, and gzip's checksums.

`layouts.py` and `t5x.py` call them before they read an array.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import tensorstore as ts

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import describe_lfs_pointer

LARGE = 2**26  # bytes of a chunk


def check_chunk_size(store: ts.TensorStore, what: str) -> None:
    """Checks that a chunk is small, or at most twice as large as its array.

    TensorStore allocates a whole chunk; if it cannot, it aborts the process.

    Raises:
      ConfigError: a chunk is too large.
    """
    itemsize = store.dtype.numpy_dtype.itemsize
    chunk = math.prod(side or 1 for side in store.chunk_layout.read_chunk.shape or ()) * itemsize
    array = math.prod(store.shape) * itemsize
    if chunk > LARGE and chunk > 2 * array:
        raise ConfigError(
            f"cannot read {what}: it has chunks of {chunk} bytes for an array of {array} bytes. "
            "The checkpoint is damaged: copy it again."
        )


def check_gzipped(store: ts.TensorStore, what: str) -> None:
    """Decompresses every gzipped chunk of an array on a local disk.

    TensorStore stops reading a chunk once it has all numbers, so it notices neither a missing end
    nor a wrong checksum.

    Raises:
      ConfigError: a file is truncated, or its checksum differs.
    """
    spec: dict[str, Any] = store.spec().to_json()
    compressor = spec.get("metadata", {}).get("compressor")
    place = spec.get("kvstore", {})
    if place.get("driver") != "file" or not isinstance(compressor, dict):
        return
    if spec.get("driver") != "zarr" or compressor.get("id") != "gzip":
        return
    for file in Path(place["path"]).iterdir():
        if not re.fullmatch(r"\d+([./]\d+)*", file.name):
            continue
        try:
            with gzip.open(file) as chunk:
                while chunk.read(2**20):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                describe_lfs_pointer(file)
                or f"cannot read {what}: {os.fspath(file)} is truncated, or its checksum differs. "
                "The checkpoint is damaged, or was copied incompletely: copy it again."
            ) from error
