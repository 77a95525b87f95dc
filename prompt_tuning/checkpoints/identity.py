"""The fingerprint of a backbone.

It is saved with every prompt. A prompt is refused by a backbone with another fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

VALUES = 64  # values from each end of a parameter


def backbone_identity(params: Mapping[str, Array | np.ndarray]) -> str:
    """The hexadecimal SHA-256 of all names and shapes, and of some values of each parameter.

    The values are rounded to bfloat16, so the fingerprint is the same in float32 and bfloat16. It
    does not depend on sharding or file format. The values are the start of the first row and the
    end of the last row, so that no large array is read or gathered. Fine-tuning changes them in
    every matrix.

    >>> backbone_identity({"scale": np.ones(4)}) == backbone_identity({"scale": np.ones(5)})
    False
    """
    digest = hashlib.sha256()
    for name, array in sorted(params.items()):
        digest.update(f"{name} {tuple(array.shape)}\n".encode())
        ends = _fetch_ends(array) if isinstance(array, jax.Array) else _ends(array)
        # Round on the host: accelerators may flush the smallest numbers to zero.
        rounded = np.asarray(ends).astype(jnp.bfloat16)
        digest.update(rounded.view(np.uint16).astype("<u2").tobytes())
    return digest.hexdigest()


def _ends(array: Any, numpy: ModuleType = np) -> Any:
    rows = [numpy.atleast_1d(array[(row,) * (array.ndim - 1)]) for row in (0, -1)]
    return numpy.concatenate([rows[0][:VALUES], rows[1][-VALUES:]])


_ends_on_device = functools.partial(_ends, numpy=jnp)
_compiled = jax.jit(_ends_on_device)  # compiled once for each shape; a model has few shapes


def _fetch_ends(array: Float[Array, "..."]) -> Float[Array, "ends"]:
    if array.is_fully_addressable:
        return _compiled(array)
    mesh = cast(NamedSharding, array.sharding).mesh  # several hosts: a collective
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(_ends_on_device, out_shardings=everywhere)(array)
