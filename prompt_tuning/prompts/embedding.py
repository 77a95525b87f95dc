"""What a prompt is compared with: the embeddings and the identity of a checkpoint, read in slices.

`inspection.py` and `convert.py` need no more of a checkpoint, however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from prompt_tuning.checkpoints import huggingface
from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.layouts import find_checkpoint, open_leaves
from prompt_tuning.checkpoints.load import find_path
from prompt_tuning.checkpoints.t5x_prompt import is_prompt_leaf
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import explain

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
    """The table of a T5X checkpoint (local, `gs://` or "tiny") or of a Hugging Face folder.

    Raises:
      ConfigError: there is no such checkpoint, or no such table in it.
    """
    path = find_path(checkpoint)
    if huggingface.is_huggingface(path):
        source = huggingface.open_folder(path).sources[NAME]
        return EmbeddingTable(
            (source.shape[0], source.shape[1]),
            lambda start, stop: source.read((slice(start, stop), slice(None))),
        )
    stored = find_checkpoint(path)
    leaf = stored.params.get(NAME)
    if leaf is None:
        raise ConfigError(f"the checkpoint {stored.folder.url} is not a T5: it has no {NAME}.")
    (store,) = open_leaves({NAME: leaf}, ts.Context()).values()
    if len(store.shape) != 2:
        raise ConfigError(f"{leaf.what} has shape {tuple(store.shape)}; a table is (V, D).")

    def read(start: int, stop: int) -> np.ndarray:
        part = store[start:stop]
        return explain(lambda: np.asarray(part.read().result()), leaf.folder, leaf.what)

    return EmbeddingTable((store.shape[0], store.shape[1]), read)


class _Stored:
    """A parameter in its file, of which `backbone_identity` reads two rows."""

    def __init__(self, shape: Sequence[int], read: Callable[[tuple[slice, ...]], Any]) -> None:
        self.shape, self.ndim, self._read = tuple(shape), len(shape), read

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        rows = [slice(i % size, i % size + 1) for i, size in zip(index, self.shape, strict=False)]
        rest = [slice(None)] * (self.ndim - len(rows))
        return np.asarray(self._read((*rows, *rest))).reshape(-1)


def read_identity(checkpoint: str) -> str:
    """`identity.backbone_identity` of a checkpoint, with or without a prompt in it."""
    path = find_path(checkpoint)
    if huggingface.is_huggingface(path):
        sources = huggingface.open_folder(path).sources
        stored = {name: _Stored(source.shape, source.read) for name, source in sources.items()}
    else:
        leaves = find_checkpoint(path).params
        leaves = {name: leaf for name, leaf in leaves.items() if not is_prompt_leaf(name)}
        stores = open_leaves(leaves, ts.Context())
        stored = {
            name: _Stored(store.shape, lambda index, store=store: store[index].read().result())
            for name, store in stores.items()
        }
    return backbone_identity(cast(Any, stored))
