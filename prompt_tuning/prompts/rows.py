"""What the arrays of a prompt are in every form: finite floating-point numbers, of known shapes."""

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
    return Prompt(_finite(rows, where))


def _finite(array: Shaped[np.ndarray, "..."], where: str) -> Any:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(
            f"{where} holds {array.dtype}; a prompt must hold floating-point numbers."
        )
    with np.errstate(over="ignore"):  # numbers beyond float32 are counted below
        copy: Any = np.array(array, dtype=np.float32, order="C")
    if bad := int(np.size(copy) - np.isfinite(copy).sum()):
        raise ConfigError(
            f"{where} holds {bad} values that are not finite: training diverged. Choose another."
        )
    return copy


def check_arrays(prompt: Prompt, where: str) -> Prompt:
    """The prompt with arrays float32 in numpy, if it is one prompt with any of the fields.

    Raises:
      ConfigError: it has members, an array has too many axes or none, or see `make_prompt`.
    """
    if prompt.lengths is not None:
        raise ConfigError(f"{where} has members. Expected one prompt: save each of them alone.")
    others = other_fields(prompt)
    if not others:
        return make_prompt(np.asarray(prompt.rows), where)
    axes = {"rows": 2, "encoder": 5, "decoder": 5, "cross": 5, "memory": 2}
    arrays = {}
    for field in ("rows", *others):
        array = np.asarray(getattr(prompt, field))
        if array.ndim != axes[field] or (field != "rows" and 0 in array.shape):
            raise ConfigError(
                f"{where} has {field} of shape {array.shape}. Expected {axes[field]} axes."
            )
        arrays[field] = _finite(array, f"{where}, {field},")
    return Prompt(**arrays)


def widen_no_rows(prompt: Prompt, embed_dim: int) -> Prompt:
    """The prompt with rows of the model's width, where it has none: files of a prefix hold none."""
    if prompt.rows.shape != (0, 0):
        return prompt
    no_rows: Any = np.zeros((0, embed_dim), np.float32)
    return prompt._replace(rows=no_rows)


def check_rows_alone(prompt: Prompt, where: str) -> None:
    """Raises ConfigError unless the prompt is rows in front of the input and nothing else."""
    if others := other_fields(prompt):
        raise ConfigError(
            f"{where} is a prompt of {', '.join(others)}. Expected rows alone: only Predictor, "
            "t5x eval, t5x infer and serving read keys, values and memory."
        )
