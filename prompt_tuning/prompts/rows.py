"""What the rows of a prompt are in every form: a finite matrix of floating-point numbers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt, other_fields


def make_prompt(rows: Shaped[np.ndarray, "..."], where: str) -> Prompt:
    """The prompt of these rows, float32[P, D] in numpy: on no device yet.

    Raises:
      ConfigError: the array is not a matrix, is empty, or holds integers, NaN or infinity.
    """
    if rows.ndim != 2 or 0 in rows.shape:
        raise ConfigError(f"{where} has shape {rows.shape}; a prompt must be a matrix (P, D).")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ConfigError(f"{where} holds {rows.dtype}; a prompt must hold floating-point numbers.")
    with np.errstate(over="ignore"):  # numbers beyond float32 are counted below
        array: Any = np.array(rows, dtype=np.float32, order="C")
    if bad := int(np.size(array) - np.isfinite(array).sum()):
        raise ConfigError(
            f"{where} holds {bad} values that are not finite: training diverged. Choose another."
        )
    return Prompt(array)


def check_rows(prompt: Prompt, where: str) -> Prompt:
    """The prompt as `make_prompt` returns it, if it is rows alone.

    Raises:
      ConfigError: it has members, or keys, values or memory; or see `make_prompt`.
    """
    if others := other_fields(prompt):
        raise ConfigError(
            f"{where} has {', '.join(others)}: only prompts of rows can be written to files. "
            "Expected a Prompt with no other field."
        )
    return make_prompt(np.asarray(prompt.rows), where)
