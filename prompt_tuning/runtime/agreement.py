"""Checks that all processes of a run have the same settings, files and errors.

If processes disagree, a collective deadlocks. `training/loop.py`, `evaluation/matrix.py` and
`checkpoints/run_state.py` call these checks; they are collectives themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from prompt_tuning.config import ConfigError


def check(what: str, content: bytes | str) -> None:
    """Checks that every process has the same content; `what` names it.

    Raises:
      ConfigError: the contents differ; every process raises it.
    """
    content = content if isinstance(content, bytes) else content.encode()
    digest = int.from_bytes(hashlib.sha256(content).digest()[:3], "big")
    if _min_max(digest) != (digest, digest):
        raise ConfigError(
            f"the processes of this run do not have the same {what} (this is process "
            f"{jax.process_index()}). Give all of them the same command, the same files and the "
            "same MODEL_DIR on a file system that they share."
        )


@contextlib.contextmanager
def raise_together(message: str) -> Iterator[None]:
    """A block of all processes: if one process raises, all do.

    Raises:
      ValueError: with `message`, in the processes that had no error themselves.
    """
    try:
        yield
    except Exception:
        _min_max(0)
        raise
    if _min_max(1)[0] == 0:
        raise ValueError(message)


def _min_max(value: int) -> tuple[int, int]:
    """The minimum and the maximum of all processes' values, which must be below 2**24.

    JAX's own helpers are not used: they need the same number of devices in every process.
    """
    if jax.process_count() == 1:
        return value, value
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    local = np.full((mesh.size,), value, np.int32)
    values = jax.make_array_from_callback(local.shape, sharded, lambda index: local[index])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    least, most = jax.jit(lambda x: (x.min(), x.max()), out_shardings=everywhere)(values)
    return int(least), int(most)
