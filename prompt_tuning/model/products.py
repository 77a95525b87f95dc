"""Products of matrices in bfloat16: how they are summed, and their gradients.

A product of two bfloat16 numbers is exact in float32. All products here are summed in float32 and
rounded once, and so are those of the gradient, whose incoming share is rounded first: no operand
is ever copied to float32, neither a frozen weight nor what has come in.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(
    spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: Any = None
) -> Float[Array, "..."]:
    """`jnp.einsum(spec, x, y)` in `dtype` (that of `x` unless given).

    Every letter of `spec` stands in two of its three parts at least, and there is no "...": then
    each gradient is a product of the same kind.

    >>> product("ab,bc->ac", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if x.dtype != jnp.bfloat16 or y.dtype != jnp.bfloat16:
        return _multiply(spec, dtype, x, y)
    return _product(spec, dtype, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, dtype: Any, x: Array, y: Array) -> Array:
    # XLA's CPU compiler has the processor's bfloat16 instructions for products that give float32;
    # others it computes on float32 copies, in five times as long.
    on_processor = lambda x, y: _multiply(spec, jnp.float32, x, y).astype(dtype)  # noqa: E731
    elsewhere = lambda x, y: _multiply(spec, dtype, x, y)  # noqa: E731
    return jax.lax.platform_dependent(x, y, cpu=on_processor, default=elsewhere)


def _multiply(spec: str, dtype: Any, x: Array, y: Array) -> Array:
    """The einsum, with the operand first whose last axes are summed over, where there is one.

    Processors take up to a third longer for the other order. One that has only its last two axes
    to swap does not come first: XLA's CPU compiler fails at it in bfloat16 (jaxlib 0.10), so where
    both have, they are copied to float32, as it does itself where it does not fail.
    """
    first, second, out = spec.replace("->", ",").split(",")
    summed = "".join(c for c in first if c in second and c not in out)
    rows = "".join(c for c in first if c in second and c in out)
    if not first.endswith(summed) and (second.endswith(summed) or first.startswith(rows)):
        first, second, x, y = second, first, y, x
    if not first.endswith(summed) and first.startswith(rows) and dtype == jnp.float32:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)

    def axes(group: str) -> tuple[list[int], list[int]]:
        return [first.index(c) for c in group], [second.index(c) for c in group]

    made = jax.lax.dot_general(x, y, (axes(summed), axes(rows)), preferred_element_type=dtype)
    names = rows + "".join(c for c in first + second if c not in rows + summed)
    return made.transpose([names.index(c) for c in out])


def _forward(spec: str, dtype: Any, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(spec, dtype, x, y), (x, y)


def _backward(
    spec: str, dtype: Any, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, y = kept
    of_x, of_y, out = spec.replace("->", ",").split(",")
    gradient = gradient.astype(x.dtype)
    return (
        _product(f"{out},{of_y}->{of_x}", x.dtype, gradient, y),
        _product(f"{of_x},{out}->{of_y}", y.dtype, x, gradient),
    )


_product.defvjp(_forward, _backward)


def dense_product(x: Array, kernel: Array, *_: Any, dtype: Any = None, **__: Any) -> Array:
    """`product` in the place where Linen's Dense takes one: the last axis with the first."""
    rows = "abcdefgh"[: x.ndim - 1]
    return product(f"{rows}y,yz->{rows}z", x, kernel, dtype)
