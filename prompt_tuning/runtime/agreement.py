"""What the processes of a run have to agree on: they ask each other, each about what it has.

Where they differ, one would wait in a collective for others that are elsewhere, for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from prompt_tuning.config import ConfigError


def agree(what: str, content: bytes | str) -> None:
    """Goes on where every process comes with the same content.

    Raises:
      ConfigError: they differ in `what`; every process raises it.
    """
    content = content if isinstance(content, bytes) else content.encode()
    seen = int.from_bytes(hashlib.sha256(content).digest()[:3], "big")
    if _extremes(seen) != (seen, seen):
        raise ConfigError(
            f"the processes of this run do not have the same {what} (this is process "
            f"{jax.process_index()}). Give all of them the same command, the same files and the "
            "same MODEL_DIR on a file system that they share."
        )


@contextlib.contextmanager
def together(failed: str) -> Iterator[None]:
    """A block that every process goes through: where one raises, all do.

    Raises:
      ValueError: `failed`, in the processes in which nothing was wrong.
    """
    try:
        yield
    except Exception:
        _extremes(0)
        raise
    if _extremes(1)[0] == 0:
        raise ValueError(failed)


def _extremes(value: int) -> tuple[int, int]:
    """The least and the greatest of all processes' values, below 2**24.

    Not by JAX's own helpers, for which every process needs as many devices.
    """
    if jax.process_count() == 1:
        return value, value
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
    lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    mine = np.full((mesh.size,), value, np.int32)
    values = jax.make_array_from_callback(mine.shape, lies, lambda index: mine[index])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    least, most = jax.jit(lambda x: (x.min(), x.max()), out_shardings=everywhere)(values)
    return int(least), int(most)
