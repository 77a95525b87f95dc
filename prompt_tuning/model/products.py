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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_tuning.config import Attending, ConfigError, ModelConfig
from prompt_tuning.model.device import Device


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
    to swap does not come first: of such a product of bfloat16 XLA's CPU compiler believes that it
    has an instruction for it, and fails when it runs (jaxlib 0.10). Where both are such, they are
    copied to float32: of the encoder's output in cross-attention, and the gradients of kernels.
    """
    first, second, out = spec.replace("->", ",").split(",")
    summed = "".join(c for c in first if c in second and c not in out)
    rows = "".join(c for c in first if c in second and c in out)
    in_front = bool(rows) and first.startswith(rows)
    if not first.endswith(summed) and (second.endswith(summed) or in_front):
        first, second, x, y = second, first, y, x
    if not first.endswith(summed) and first.startswith(rows) and dtype == jnp.float32:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    over, along = (
        ([first.index(c) for c in group], [second.index(c) for c in group])
        for group in (summed, rows)
    )
    made = jax.lax.dot_general(x, y, (over, along), preferred_element_type=dtype)
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


# Attention ----------------------------------------------------------------------------------------


@jax.custom_vjp
def attend(
    query: Float[Array, "*B Q H K"],
    key: Float[Array, "*B S H K"],
    value: Float[Array, "*B S H K"],
    bias: Float[Array, "#*B #H Q S"],
) -> Float[Array, "*B Q H K"]:
    """Every query's mean of the values."""
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query: Array, key: Array, value: Array, bias: Array) -> tuple[Array, Any]:
    rows = "B" * (query.ndim - 3)
    seen = _see(_Axes(f"{rows}QHK", f"{rows}SHK"), query, (key, value), bias, None)
    return seen.mean, (query, key, value, bias, seen)


def _attend_backward(kept: Any, gradient: Array) -> tuple[Array, ...]:
    query, key, value, bias, seen = jax.lax.optimization_barrier(kept)
    rows = "B" * (query.ndim - 3)
    axes = _Axes(f"{rows}QHK", f"{rows}SHK")
    gradient, of_logits, of_bias, _ = _pass_back(axes, gradient, value, bias, None, seen)
    return (
        product(f"{axes.logits},{axes.source}->{axes.query}", of_logits, key),
        product(f"{axes.logits},{axes.query}->{axes.source}", of_logits, query),
        product(f"{axes.logits},{axes.query}->{axes.source}", seen.weights, gradient),
        of_bias,
    )


attend.defvjp(_attend_forward, _attend_backward)


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


@jax.custom_vjp
def attend_to_source(
    query: Float[Array, "B H Q D"],
    source: Float[Array, "B S D"],
    bias: Float[Array, "#B #H Q S"],
    keep: Float[Array, "B H 1 S"] | None = None,
) -> Float[Array, "B H Q D"]:
    """`attend` where positions are their own keys and values, the same for every head.

    `keep` is what dropout multiplies a head's weights by, the same for all queries; where a head
    has values of its own it multiplies these. Backward, what a position gives as key and as value
    is one product: derived, there are two, of the size of the source, and XLA keeps those of many
    layers.
    """
    return _attend_to_source_forward(query, source, bias, keep)[0]


def _attend_to_source_forward(
    query: Array, source: Array, bias: Array, keep: Array | None
) -> tuple[Array, Any]:
    seen = _see(_Axes("BHQD", "BSD"), query, (source, source), bias, keep)
    return seen.mean, (query, source, bias, keep, seen)


def _attend_to_source_backward(kept: Any, gradient: Array) -> tuple[Array | None, ...]:
    query, source, bias, keep, seen = jax.lax.optimization_barrier(kept)
    axes = _Axes("BHQD", "BSD")
    gradient, of_logits, of_bias, of_keep = _pass_back(axes, gradient, source, bias, keep, seen)
    of_source = product(
        "BZHQS,BZHQD->BSD",
        jnp.stack([of_logits, _kept(seen.weights, keep)], axis=1),
        jnp.stack([query, gradient], axis=1),
    )
    return product("BHQS,BSD->BHQD", of_logits, source), of_source, of_bias, of_keep


attend_to_source.defvjp(_attend_to_source_forward, _attend_to_source_backward)


class _Axes(NamedTuple):
    """The axes of the queries and of what they attend to; logits are `*B H Q S`."""

    query: str
    source: str

    @property
    def logits(self) -> str:
        return "B" * self.query.count("B") + "HQS"

    def of_queries(self, x: Float[Array, "*B H Q"]) -> Array:
        """A number a query, to be multiplied by the queries."""
        return (x.swapaxes(-1, -2) if self.query.endswith("QHK") else x)[..., None]

    def over_queries(self, x: Array) -> Float[Array, "*B H Q"]:
        """The sum of every query's own numbers."""
        total = x.sum(axis=-1)
        return total.swapaxes(-1, -2) if self.query.endswith("QHK") else total


class _Seen(NamedTuple):
    """What the backward pass needs of the forward one."""

    weights: Float[Array, "*B H Q S"]  # exponentials: not yet divided by their sum
    scale: Float[Array, "*B H Q"]  # which divides them
    mean: Array  # what comes out


def _see(
    axes: _Axes, query: Array, source: tuple[Array, Array], bias: Array, keep: Array | None
) -> _Seen:
    key, value = source
    logits = product(f"{axes.query},{axes.source}->{axes.logits}", query, key, jnp.float32) + bias
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(query.dtype)
    scale = 1.0 / weights.sum(axis=-1, dtype=jnp.float32)
    total = product(
        f"{axes.logits},{axes.source}->{axes.query}", _kept(weights, keep), value, jnp.float32
    )
    return _Seen(weights, scale, (total * axes.of_queries(scale)).astype(query.dtype))


def _kept(weights: Array, keep: Array | None) -> Array:
    return weights if keep is None else weights * keep


def _pass_back(
    axes: _Axes, gradient: Array, value: Array, bias: Array, keep: Array | None, seen: _Seen
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients: of the sum before it was divided, of logits, of bias and of `keep`."""
    gradient = gradient * axes.of_queries(seen.scale)
    # The mean of the weights' gradients is that of what came out: no sum over the keys.
    mean = axes.over_queries(gradient * seen.mean)[..., None]
    gradient = gradient.astype(seen.mean.dtype)
    given = product(f"{axes.query},{axes.source}->{axes.logits}", gradient, value, jnp.float32)
    of_logits = seen.weights * (_kept(given, keep) - mean)
    shared = tuple(axis for axis, n in enumerate(bias.shape) if n < of_logits.shape[axis])
    of_bias = of_logits.sum(axis=shared, keepdims=True)
    of_keep = None if keep is None else (seen.weights * given).sum(axis=-2, keepdims=True)
    return gradient, of_logits.astype(seen.mean.dtype), of_bias, of_keep


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
            return [x if rows > 1 else x[0]] * len(sizes)
        parts = jax.lax.split(x, sizes)  # backward it is put together; slices would be added up
        return parts if rows > 1 else [part[0] for part in parts]  # a batch of one is slower

    given = [split(x) for x in (query, key, value, bias)]
    parts = [attend(*part) for part in zip(*given, strict=True)]
    return jnp.concatenate(parts) if rows > 1 else jnp.stack(parts)
