"""The checksums of gzipped chunks, for `t5x verify`.

TensorStore stops reading a gzipped chunk once it has its numbers, so it notices neither a missing
end nor a wrong checksum.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path
from typing import Any

import tensorstore as ts

from prompt_tuning.config import ConfigError


def check_gzipped(store: ts.TensorStore, what: str) -> None:
    """Unpacks every gzipped chunk of an array that lies on a local disk.

    Raises:
      ConfigError: names the array and the file whose end is missing or whose checksum differs.
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
                f"cannot read {what}: {os.fspath(file)} ends too early, or its checksum differs. "
                "The checkpoint is damaged, or was copied incompletely: copy it again."
            ) from error
