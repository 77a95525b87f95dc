"""Products of matrices: how they are summed, rounded and differentiated, on which device.

A product of two bfloat16 numbers is exact in float32. Products of bfloat16 are summed in float32
and rounded once. So are those of their gradients, and the incoming gradient is rounded first: no
operand is copied to float32, neither a frozen weight nor an activation.

`attention.py`, the next file, and `layers.py` multiply by them. Letters as in `t5.py`; Q queries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array, Float


def einsum(
    spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: Any = None
) -> Float[Array, "..."]:
    """`jnp.einsum(spec, x, y)` in `dtype` (that of `x` by default), summed in float32.

    In the specs of this project the result has the axes of a batch, then those of `x`, then those
    of `y`: jnp.einsum is then one product of `x` and `y` in this order. The axes that are summed
    are the last of `x` wherever they can be: processors take up to a third longer for other orders.

    Gradients of bfloat16 that JAX derives from it would copy operands to float32: call it in the
    passes of a `jax.custom_vjp`.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if not _in_bfloat16(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=dtype)
    # XLA's CPU compiler has the processor's bfloat16 instructions for products that give float32;
    # others it computes on float32 copies, in five times as long.
    on_processor = lambda x, y: jnp.einsum(  # noqa: E731
        spec, x, y, preferred_element_type=jnp.float32
    ).astype(dtype)
    elsewhere = lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=dtype)  # noqa: E731
    return jax.lax.platform_dependent(x, y, cpu=on_processor, default=elsewhere)


def _in_bfloat16(x: Array, y: Array) -> bool:
    return x.dtype == y.dtype == jnp.bfloat16


# Products with kernels ---------------------------------------------------------------------------
# y = x W        dL/dx = dL/dy W^T        dL/dW = x^T dL/dy, summed over all positions


def multiply(x: Float[Array, "*B D"], kernel: Float[Array, "D F"], dtype: Any = None) -> Array:
    """`x @ kernel`, [*B, F], in `dtype` (that of `x` by default).

    >>> multiply(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    if _in_bfloat16(x, kernel):
        return _multiply(x, kernel, dtype)
    return einsum("...D,DF->...F", x, kernel, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: Array, kernel: Array, dtype: Any) -> Array:
    return einsum("...D,DF->...F", x, kernel, dtype)


def _multiply_forward(x: Array, kernel: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(x, kernel, dtype), (x, kernel)


def _multiply_backward(
    dtype: Any, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    positions, gradients = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    return (
        einsum("...F,DF->...D", gradient, kernel),
        einsum("ND,NF->DF", positions, gradients),
    )


_multiply.defvjp(_multiply_forward, _multiply_backward)


def dense_product(x: Array, kernel: Array, *_: Any, dtype: Any = None, **__: Any) -> Array:
    """`multiply` with the arguments that Linen's Dense gives its product."""
    return multiply(x, kernel, dtype)


# The kernel of keys or values, multiplied into each head: one product is the other's transpose.
# y = sum_K x W   dL/dx = sum_D dL/dy W   dL/dW = sum_BQ x dL/dy


def widen_heads(
    x: Float[Array, "B Q H K"], kernel: Float[Array, "D H K"]
) -> Float[Array, "B H Q D"]:
    """Every head of `x` times its part of the kernel: as wide as the model."""
    return (_widen if _in_bfloat16(x, kernel) else _plain_widen)(x, kernel)


def narrow_heads(
    x: Float[Array, "B H Q D"], kernel: Float[Array, "D H K"]
) -> Float[Array, "B Q H K"]:
    """Every head of `x`, which is as wide as the model, times its part of the kernel."""
    return (_narrow if _in_bfloat16(x, kernel) else _plain_narrow)(x, kernel)


def _plain_widen(x: Array, kernel: Array) -> Array:
    return einsum("BQHK,DHK->HBQD", x, kernel).swapaxes(0, 1)


def _plain_narrow(x: Array, kernel: Array) -> Array:
    return jnp.moveaxis(einsum("BHQD,DHK->HBQK", x, kernel), 0, 2)


def _kernel_gradient(narrow: Float[Array, "B Q H K"], wide: Float[Array, "B H Q D"]) -> Array:
    return jnp.moveaxis(einsum("BQHK,BHQD->HKD", narrow, wide), 2, 0)


_widen, _narrow = jax.custom_vjp(_plain_widen), jax.custom_vjp(_plain_narrow)
_widen.defvjp(
    lambda x, kernel: (_widen(x, kernel), (x, kernel)),
    lambda saved, g: (_plain_narrow(g, saved[1]), _kernel_gradient(saved[0], g)),
)
_narrow.defvjp(
    lambda x, kernel: (_narrow(x, kernel), (x, kernel)),
    lambda saved, g: (_plain_widen(g, saved[1]), _kernel_gradient(g, saved[0])),
)


# A product that XLA cannot compute ---------------------------------------------------------------
# XLA's CPU compiler fails on a bfloat16 product with a batch if the summed axes of its first
# operand stand in front of the others: "UNIMPLEMENTED: Unsupported element type for
# DotThunk::Execute: BF16 x BF16 = F32", when it runs. It asks whether YNNPACK computes the product
# (IsDotSupportedByYnn) while the operand is still transposed in front of it, and leaves the dtypes
# as they are. Later it folds the transpose into the product, which YNNPACK then refuses. jaxlib
# 0.10.2 has the defect; no report of it upstream is known.

XLA_FAILS_BEFORE = (1, 0)  # lower it to the first jaxlib that computes the product


def sum_queries(
    weights: Float[Array, "B Z H Q S"], x: Float[Array, "B Z H Q D"]
) -> Float[Array, "B S D"]:
    """The sum of `x` over Z, heads and queries, weighted for each position.

    Both operands have their summed axes in front of the others. Processors get float32 copies of
    them, which are small: it is for few queries.
    """
    spec = "BZHQS,BZHQD->BSD"
    if not _in_bfloat16(weights, x) or jaxlib.version.__version_info__ >= XLA_FAILS_BEFORE:
        return einsum(spec, weights, x)
    wide = lambda *xs: jnp.einsum(spec, *(x.astype(jnp.float32) for x in xs))  # noqa: E731
    return jax.lax.platform_dependent(
        weights,
        x,
        cpu=lambda *xs: wide(*xs).astype(x.dtype),
        default=lambda *xs: jnp.einsum(spec, *xs, preferred_element_type=x.dtype),
    )
