"""The embedding table of a checkpoint, read in slices: nothing else of the checkpoint is touched.

`inspection.py` holds prompts against it, however large the vocabulary is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from prompt_tuning.checkpoint.layouts import find_checkpoint, open_leaves
from prompt_tuning.checkpoint.storage import explain
from prompt_tuning.config import TINY, ConfigError
from prompt_tuning.world import assets

NAME = "token_embedder/embedding"
CHUNK_VALUES = 2**24  # float32: 64 MiB at a time


class EmbeddingTable(NamedTuple):
    """V rows of width D that stay where they are stored."""

    shape: tuple[int, int]
    read: Callable[[int, int], np.ndarray]  # rows from, to

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "N D"]:
        """Some of the rows, in float32."""
        return np.asarray(self.read(start, stop), np.float32)

    def chunks(self, limit: int) -> Iterator[tuple[int, Float[np.ndarray, "N D"]]]:
        """The first `limit` rows, a part at a time, and where each part begins."""
        size = max(1, CHUNK_VALUES // self.shape[1])
        for start in range(0, limit, size):
            yield start, self.rows(start, min(start + size, limit))


def open_embedding(checkpoint: str) -> EmbeddingTable:
    """The table of a T5X checkpoint, local, `gs://` or "tiny".

    Raises:
      ConfigError: there is no such checkpoint, or no such table in it.
    """
    found = find_checkpoint(assets.tiny_checkpoint() if checkpoint == TINY else checkpoint)
    leaf = found.params.get(NAME)
    if leaf is None:
        raise ConfigError(f"the checkpoint {found.folder.url} is no T5: it has no {NAME}.")
    (store,) = open_leaves({NAME: leaf}, ts.Context()).values()
    if len(store.shape) != 2:
        raise ConfigError(f"{leaf.what} has shape {tuple(store.shape)}; a table is (V, D).")

    def read(start: int, stop: int) -> np.ndarray:
        part = store[start:stop]
        return explain(lambda: np.asarray(part.read().result()), leaf.folder, leaf.what)

    return EmbeddingTable((store.shape[0], store.shape[1]), read)
