"""Layers that several methods are made of, with the first values that PyTorch gives them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.methods.method import Params


def init_dense(
    key: PRNGKeyArray, name: str, inputs: int, outputs: int, bound: float | None = None
) -> Params:
    """{name_kernel: float[inputs, outputs], name_bias: float[outputs]}, as torch.nn.Linear begins.

    Both are uniform in [-bound, bound], by default 1/sqrt(inputs).
    """
    kernel, bias = jax.random.split(key)
    bound = 1 / math.sqrt(inputs) if bound is None else bound
    return {
        f"{name}_kernel": uniform(kernel, (inputs, outputs), bound),
        f"{name}_bias": uniform(bias, (outputs,), bound),
    }


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> Array:
    """Draws from [-bound, bound], float32."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def dense(params: Params, name: str, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """X W + b."""
    return x @ params[f"{name}_kernel"] + params[f"{name}_bias"]
