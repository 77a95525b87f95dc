"""What a prompt is in every form: a finite matrix of floating-point numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from prompt_tuning.config import ConfigError


def check_array(prompt: Shaped[np.ndarray, "..."], where: str) -> Float[np.ndarray, "P D"]:
    """The prompt in float32, by rows.

    Raises:
      ConfigError: it has another number of dimensions, is empty, or holds integers or NaN.
    """
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ConfigError(f"{where} has shape {prompt.shape}; a prompt must be a matrix (P, D).")
    if not jnp.issubdtype(prompt.dtype, jnp.floating):
        raise ConfigError(
            f"{where} holds {prompt.dtype}; a prompt must hold floating-point numbers."
        )
    with np.errstate(over="ignore"):  # what is beyond float32 is counted below
        prompt = np.array(prompt, dtype=np.float32, order="C")
    if bad := int(np.size(prompt) - np.isfinite(prompt).sum()):
        raise ConfigError(
            f"{where} holds {bad} values that are not finite: training diverged. Take another one."
        )
    return prompt
