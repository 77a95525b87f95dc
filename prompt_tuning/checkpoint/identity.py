"""Which backbone is this? A prompt names the one it was trained on and is refused by another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

VALUES = 64  # from either end of a parameter


def backbone_identity(params: Mapping[str, Array | np.ndarray]) -> str:
    """The SHA-256, in hexadecimal, of all names and shapes and some values of each parameter.

    The values are rounded to bfloat16, so a model has one identity whether it runs in float32 or
    bfloat16; and as a function of the values alone it does not depend on sharding or file format.
    They are the start of the first row and the end of the last row, so that nothing large is read
    or gathered: of a fine-tuned model, every matrix differs there.

    >>> backbone_identity({"scale": np.ones(4)}) == backbone_identity({"scale": np.ones(5)})
    False
    """
    digest = hashlib.sha256()
    for name, array in sorted(params.items()):
        digest.update(f"{name} {tuple(array.shape)}\n".encode())
        ends = _ends_on_device(array) if isinstance(array, jax.Array) else _ends(array)
        # Rounded on the host: accelerators may flush the smallest numbers to zero.
        rounded = np.asarray(ends).astype(jnp.bfloat16)
        digest.update(rounded.view(np.uint16).astype("<u2").tobytes())
    return digest.hexdigest()


def _ends(array: Float[Array, "..."] | np.ndarray) -> Float[Array, "ends"] | np.ndarray:
    numpy = jnp if isinstance(array, jax.Array) else np
    array = array.reshape(1) if array.ndim == 0 else array
    first, last = (array[(row,) * (array.ndim - 1)] for row in (0, -1))
    return numpy.concatenate([first[:VALUES], last[-VALUES:]])


_ends_on_device = jax.jit(_ends)  # compiled once a shape: a model has few
