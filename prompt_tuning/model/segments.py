"""Which positions see each other: one rule for plain rows and for packed ones.

A row's positions are marked with booleans, or, where several examples share the row, with the
number of the example, counted from 1; 0 is padding. `t5.py` makes its attention masks of them.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Int

Valid = Bool[Array, "B S"] | Int[Array, "B S"]
TargetValid = Bool[Array, "B L"] | Int[Array, "B L"]


def sees(
    queries: Bool[Array, "B Q"] | Int[Array, "B Q"], keys: Bool[Array, "B S"] | Int[Array, "B S"]
) -> Bool[Array, "B Q S"]:
    """True where a valid query meets a valid key, in a packed row one of its own example.

    Relative positions need no such care: within an example the distances are what they were.

    >>> import jax.numpy as jnp
    >>> sees(jnp.array([[1, 2, 0]]), jnp.array([[1, 2, 2]])).astype(int).tolist()
    [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]
    """
    return (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] > 0)
