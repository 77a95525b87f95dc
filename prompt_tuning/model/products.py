"""What a T5 multiplies, and how on which device: products of matrices, and attention's of them.

A product of two bfloat16 numbers is exact in float32. All products here are summed in float32 and
rounded once, and so are those of the gradient, whose incoming share is rounded first: no operand
is ever copied to float32, neither a frozen weight nor what has come in.

Attention is the values' mean, weighted by softmax(query . key + bias). Softmax is in float32, and
its sum divides what has been seen, not the weights: of `Q x S` numbers a head, forward and
backward, there is then one pass fewer, and what is kept for the backward pass is one number each,
in the dtype of the model (as in FlashAttention: Dao et al. 2022, 3.1 and B.2).

Letters as in `t5.py`; Q queries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array, Float, Int

from prompt_tuning.config import Attending, ConfigError, ModelConfig
from prompt_tuning.model.device import Device


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


# Attention ---------------------------------------------------------------------------------------
# With queries q, keys k, values v and a bias b, and with sums over the keys s:
#
#     l_s = q . k_s + b_s      w_s = exp(l_s - max_s l_s)      z = sum_s w_s
#     o = (sum_s w_s v_s) / z
#
# Backward, with g = dL/do / z, and with g . o for sum_s w_s (g . v_s) / z, which is the same:
#
#     dL/dl_s = w_s (g . v_s - g . o)        dL/db = dL/dl, summed over the axes that b has not
#     dL/dq = sum_s dL/dl_s k_s              dL/dk_s = sum_q dL/dl_s q
#                                            dL/dv_s = sum_q w_s g
#
# w is kept for it, in the dtype of the model. Without the barriers XLA would widen it to float32
# once, forward, and keep that.


@jax.custom_vjp
def attend(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B S H K"],
    value: Float[Array, "B S H K"],
    bias: Float[Array, "#B #H Q S"],
) -> Float[Array, "B Q H K"]:
    """Every query's mean of the values, weighted by softmax(query . key + bias)."""
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query: Array, key: Array, value: Array, bias: Array) -> tuple[Array, Any]:
    with jax.named_scope("query-key"):
        logits = einsum("BQHK,BSHK->BHQS", query, key, jnp.float32) + bias
    with jax.named_scope("softmax"):
        weights, scale = _exponentials(logits, query.dtype)
    with jax.named_scope("values"):
        total = einsum("BHQS,BSHK->BHQK", weights, value, jnp.float32)
        mean = (total * scale).astype(query.dtype).swapaxes(1, 2)
    return mean, (query, key, value, bias, weights, scale, mean)


def _attend_backward(saved: Any, gradient: Float[Array, "B Q H K"]) -> tuple[Array, ...]:
    query, key, value, bias, weights, scale, mean = jax.lax.optimization_barrier(saved)
    with jax.named_scope("values"):
        gradient = gradient * scale.swapaxes(1, 2)
        along = (gradient * mean).sum(axis=-1, keepdims=True).swapaxes(1, 2)
        gradient = gradient.astype(mean.dtype)
        of_weights = einsum("BQHK,BSHK->BHQS", gradient, value, jnp.float32)
        of_value = einsum("BQHK,BHQS->BHKS", gradient, weights)
    with jax.named_scope("softmax"):
        of_logits = weights * (of_weights - along)
        of_bias = _sum_to(bias.shape, of_logits)
        of_logits = of_logits.astype(mean.dtype)
    with jax.named_scope("query-key"):
        of_query = einsum("BHQS,BSHK->BHQK", of_logits, key)
        of_key = einsum("BQHK,BHQS->BHKS", query, of_logits)
    return of_query.swapaxes(1, 2), _keys_first(of_key), _keys_first(of_value), of_bias


def _keys_first(x: Float[Array, "B H K S"]) -> Float[Array, "B S H K"]:
    return jnp.moveaxis(x, 3, 1)


attend.defvjp(_attend_forward, _attend_backward)


def _exponentials(
    logits: Float[Array, "B H Q S"], dtype: Any
) -> tuple[Float[Array, "B H Q S"], Float[Array, "B H Q 1"]]:
    """Exponentials in `dtype`, and 1 / their sum: the product of both is the softmax."""
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(dtype)
    return weights, 1.0 / weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)


def _sum_to(shape: tuple[int, ...], x: Array) -> Array:
    """`x` summed over the axes that are 1 in `shape`."""
    shared = tuple(axis for axis, size in enumerate(shape) if size < x.shape[axis])
    return x.sum(axis=shared, keepdims=True)


# The same where a position x_s of the source is key and value of every head, and the weights are
# multiplied by a factor m_s, which dropout draws for all queries:
#
#     l_s = q . x_s + b_s      o = (sum_s m_s w_s x_s) / z
#     dL/dl_s = w_s (m_s g . x_s - g . o)      dL/dm_s = sum_q w_s (g . x_s)
#     dL/dq = sum_s dL/dl_s x_s                dL/dx_s = sum_hq (dL/dl_s q + m_s w_s g)


@jax.custom_vjp
def attend_to_source(
    query: Float[Array, "B H Q D"],
    source: Float[Array, "B S D"],
    bias: Float[Array, "#B #H Q S"],
    factor: Float[Array, "B H 1 S"] | None = None,
) -> Float[Array, "B H Q D"]:
    """`attend` where positions are their own keys and values, the same for every head.

    `factor` is what dropout multiplies a head's weights by. Backward, what a position gives as key
    and as value is one product: derived, there are two, of the size of the source, and XLA keeps
    those of many layers.
    """
    return _attend_to_source_forward(query, source, bias, factor)[0]


def _attend_to_source_forward(
    query: Array, source: Array, bias: Array, factor: Array | None
) -> tuple[Array, Any]:
    with jax.named_scope("query-key"):
        logits = einsum("BHQD,BSD->BHQS", query, source, jnp.float32) + bias
    with jax.named_scope("softmax"):
        weights, scale = _exponentials(logits, query.dtype)
    with jax.named_scope("values"):
        total = einsum("BHQS,BSD->BHQD", _times(weights, factor), source, jnp.float32)
        mean = (total * scale).astype(query.dtype)
    return mean, (query, source, bias, factor, weights, scale, mean)


def _attend_to_source_backward(
    saved: Any, gradient: Float[Array, "B H Q D"]
) -> tuple[Array | None, ...]:
    query, source, bias, factor, weights, scale, mean = jax.lax.optimization_barrier(saved)
    with jax.named_scope("values"):
        gradient = gradient * scale
        along = (gradient * mean).sum(axis=-1, keepdims=True)
        gradient = gradient.astype(mean.dtype)
        of_weights = einsum("BHQD,BSD->BHQS", gradient, source, jnp.float32)
        of_factor = None
        if factor is not None:
            of_factor = (weights * of_weights).sum(axis=-2, keepdims=True)
    with jax.named_scope("softmax"):
        of_logits = weights * (_times(of_weights, factor) - along)
        of_bias = _sum_to(bias.shape, of_logits)
        of_logits = of_logits.astype(mean.dtype)
    with jax.named_scope("query-key"):
        of_query = einsum("BHQS,BSD->BHQD", of_logits, source)
        both = jnp.stack([of_logits, _times(weights, factor)], axis=1)
        of_source = sum_queries(both, jnp.stack([query, gradient], axis=1))
    return of_query, of_source, of_bias, of_factor


attend_to_source.defvjp(_attend_to_source_forward, _attend_to_source_backward)


def _times(weights: Array, factor: Array | None) -> Array:
    return weights if factor is None else weights * factor


def attend_to_lengths(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S H K"],
    value: Float[Array, "B S H K"],
    bias: Float[Array, "1 H S S"],
    lengths: Int[Array, "B"],
    kernel: Attending,
) -> Float[Array, "B S H K"]:
    """`attend` for rows of these lengths by JAX's kernels: cuDNN's keeps no weight.

    They take the bias in the dtype of the model. It is the same for all rows: with a mask added to
    it, it would be as large as the weights. What is beyond a row's length gives and takes 0: what a
    kernel makes of it, and of its gradients, is its own affair.

    Raises:
      ConfigError: cuDNN is not installed, or does not do this.
    """
    counts = (jnp.arange(query.shape[1]) < lengths[:, None])[..., None, None]
    heads = [jnp.where(counts, x, 0) for x in (query, key, value)]
    try:
        seen = jax.nn.dot_product_attention(
            *heads,
            bias=bias.astype(query.dtype),
            scale=1.0,  # T5 has none
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=kernel,
        )
    except RuntimeError as error:
        install = " pip install 'jax[cuda12]' brings it." if "cuDNN" in str(error) else ""
        raise ConfigError(
            f"ATTENTION = 'cudnn' is not possible here: {str(error).rstrip('.')}.{install} "
            "ATTENTION = 'xla' needs no cuDNN."
        ) from error
    return jnp.where(counts, seen, 0)


# A few rows at a time ----------------------------------------------------------------------------
# On processors XLA runs the small products of a batch's heads one after the other, each on all
# cores, and what they make of all rows does not stay in the caches. A few rows at a time do, and
# parts run side by side: the same numbers in half of the time forward, and in two thirds with the
# gradient.

HEADS_AT_ONCE = {"float32": 12, "bfloat16": 24}  # the same bytes
MOST_PARTS = 8  # of a batch: every part is compiled


def rows_at_once(config: ModelConfig, device: Device, rows: int, queries: int) -> int:
    """Of how many rows attention is computed at a time; all, where a row has little to compute.

    >>> base = dict(num_encoder_layers=1, num_decoder_layers=1, head_dim=64, embed_dim=512,
    ...             mlp_dim=1024, num_embeddings=32128)
    >>> cpu = Device("processor")
    >>> [rows_at_once(ModelConfig(num_heads=h, **base), cpu, 8, 228) for h in (6, 12, 64)]
    [2, 1, 1]
    >>> rows_at_once(ModelConfig(num_heads=6, **base), cpu, 32, 228)
    4
    """
    if device.kind != "processor" or queries < 32:
        return rows
    return max(1, HEADS_AT_ONCE[config.dtype] // config.num_heads, -(-rows // MOST_PARTS))


def attend_in_parts(
    rows: int,
    heads: tuple[Float[Array, "B Q H K"], Float[Array, "B S H K"], Float[Array, "B S H K"]],
    bias: Float[Array, "#B #H Q S"],
) -> Float[Array, "B Q H K"]:
    """`attend` for so many rows at a time."""
    query, key, value = heads
    batch = query.shape[0]
    if rows >= batch:
        return attend(query, key, value, bias)
    sizes = [rows] * (batch // rows) + [batch % rows] * bool(batch % rows)

    def split(x: Array) -> Sequence[Array]:
        if x.shape[0] != batch:  # the same for all rows
            return [x] * len(sizes)
        return jax.lax.split(x, sizes)  # backward it is put together; slices would be added up

    split_heads = [split(x) for x in (query, key, value, bias)]
    return jnp.concatenate([attend(*part) for part in zip(*split_heads, strict=True)])
