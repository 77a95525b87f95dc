"""Attention as functions: which positions see which, relative positions, and weighted means.

Softmax is in float32. Its sum divides the weighted sum of the values, not the weights: of `Q x S`
numbers a head, forward and backward, there is then one pass fewer, and the backward pass needs one
number each, in the dtype of the model (as in FlashAttention: Dao et al. 2022, 3.1 and B.2).

After `products.py`; `layers.py`, the next file, makes layers of it. Letters as in `t5.py`, and Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from prompt_tuning.config import Attending, ConfigError, ModelConfig
from prompt_tuning.model.device import Device
from prompt_tuning.model.products import einsum, sum_queries

MASKED = -1e10  # what T5X adds to the attention logit of a masked pair

# A row's positions are marked with booleans, or, where several examples share the row, with the
# number of the example, counted from 1; 0 is padding.
Valid = Bool[Array, "B S"] | Int[Array, "B S"]
TargetValid = Bool[Array, "B L"] | Int[Array, "B L"]


KeysValues = tuple[Float[Array, "_ _ H K"], Float[Array, "_ _ H K"]]


class Prefix(NamedTuple):
    """Keys and values in front of those that the layers of a stack compute from their input.

    They are the first of an attention's keys. R is 1 where they are the same for all rows.
    """

    keys_values: Float[Array, "R N 2 J H K"]
    valid: Bool[Array, "R J"]


def prefix_length(prefix: Prefix | None) -> int:
    """How many keys it puts in front of those of the input: J, or 0."""
    return 0 if prefix is None else prefix.valid.shape[1]


def split_layers(prefix: Prefix | None, layers: int, dtype: Any) -> list[KeysValues | None]:
    """The keys and values of each of the layers, in the dtype of the model."""
    if prefix is None:
        return [None] * layers
    rows, _, _, *heads = prefix.keys_values.shape
    joined = prefix.keys_values.astype(dtype).reshape(rows, 2 * layers, *heads)
    # Backward they are put together; slices would be added up.
    parts = [part.squeeze(1) for part in jax.lax.split(joined, [1] * 2 * layers, axis=1)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def put_in_front(prefix: KeysValues | None, keys_values: KeysValues) -> KeysValues:
    """A layer's keys and values [B, S, H, K] behind those of its prefix [R, J, H, K]."""
    if prefix is None:
        return keys_values
    front = of_rows(prefix, len(keys_values[0]))
    key, value = (jnp.concatenate(pair, axis=1) for pair in zip(front, keys_values, strict=True))
    return key, value


def of_rows(prefix: KeysValues, rows: int) -> KeysValues:
    """The keys and the values of a layer's prefix for each of so many rows."""
    key, value = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in prefix)
    return key, value


def sees_prefix(
    prefix: Prefix | None,
    queries: Bool[Array, "B Q"] | Int[Array, "B Q"],
    allowed: Bool[Array, "#B Q S"],
) -> Bool[Array, "#B Q W"]:
    """`allowed` with the positions of the prefix in front, which every valid query sees."""
    if prefix is None:
        return allowed
    seen = (queries > 0)[:, :, None] & prefix.valid[:, None, :]
    rows = max(len(seen), len(allowed))
    parts = [jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (seen, allowed)]
    return jnp.concatenate(parts, axis=2)


def relative_position_buckets(
    queries: int,
    keys: int,
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
    before: int = 0,
) -> Int[np.ndarray, "queries all_keys"]:
    """The bucket of every (query, key) distance (Raffel et al. 2020, 2.1).

    `before` more keys come first, at the positions -before .. -1: those of a prefix.

    Half of the buckets hold one distance each; the other half grow with the logarithm up to
    `max_distance` and the last takes all beyond. Bidirectional attention spends half of both on
    keys that come after the query. Logarithms are in float32, as in T5X: they decide ties.
    """
    distance = np.arange(-before, keys)[None, :] - np.arange(queries)[:, None]
    offset = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    growth = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + growth.astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


def sees(
    queries: Bool[Array, "B Q"] | Int[Array, "B Q"], keys: Bool[Array, "B S"] | Int[Array, "B S"]
) -> Bool[Array, "B Q S"]:
    """True if query and key are valid and, in a packed row, of the same example.

    Relative positions need no such care: packing does not change distances within an example.

    >>> sees(jnp.array([[1, 2, 0]]), jnp.array([[1, 2, 2]])).astype(int).tolist()
    [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]
    """
    return (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] > 0)


def attention_bias(allowed: Bool[Array, "B Q S"]) -> Float[Array, "B 1 Q S"]:
    """0 if a query may see a key, else -1e10."""
    return jnp.where(allowed, 0.0, MASKED)[:, None].astype(jnp.float32)


def row_lengths(
    config: ModelConfig, device: Device, valid: Valid, before: int = 0
) -> Int[Array, "B"] | None:
    """The lengths of the rows if attention takes lengths (cuDNN's): valid positions come first.

    Raises:
      ConfigError: several examples share a row, or there are `before` keys of a prefix.
    """
    if device.kind != "gpu" or config.attention != "cudnn":
        return None
    if before:
        raise ConfigError(
            "ATTENTION = 'cudnn' takes no keys and values in front of the input's: set "
            "ATTENTION = 'xla', or a PROMPT_METHOD whose prompt is rows."
        )
    if valid.dtype != bool:
        raise ConfigError(
            "ATTENTION = 'cudnn' takes rows of one example each: set PACK = False or "
            "ATTENTION = 'xla'."
        )
    return valid.sum(axis=-1, dtype=jnp.int32)


def absorbs(config: ModelConfig, queries: int, source: int) -> bool:
    """Whether `Attention.absorbed` takes fewer operations than keys and values, for one row.

    It multiplies the queries by the kernels, not the source's positions, and each head of a query
    becomes as wide as the model.

    >>> small = ModelConfig(num_encoder_layers=8, num_decoder_layers=8, num_heads=6, head_dim=64,
    ...                     embed_dim=512, mlp_dim=1024, num_embeddings=32128)
    >>> [absorbs(small, targets, source=228) for targets in (2, 50, 114)]
    [True, True, False]
    """
    width, head = config.embed_dim, config.head_dim
    return queries * (width * head + source * width) < source * (width * head + queries * head)


def take_rows(x: Shaped[Array, "R *D"], rows: Int[Array, "G C"]) -> Shaped[Array, "G*C *D"]:
    """Rows of `x`, which is split into G equal parts: of each part those that `rows` numbers in it.

    If each device has one part, XLA takes them there.

    >>> take_rows(jnp.array([10, 11, 12, 13]), jnp.array([[0, 0, 1], [1, 0, 0]])).tolist()
    [10, 10, 11, 13, 12, 12]
    """
    parts = x.reshape(len(rows), -1, *x.shape[1:])
    take = jax.vmap(lambda part, row: part.at[row].get(mode="promise_in_bounds"))
    return take(parts, rows).reshape(-1, *x.shape[1:])


def take_prefix(prefix: Prefix | None, rows: Int[Array, "G C"] | None) -> Prefix | None:
    """`take_rows` of a prefix; one that is the same for all rows stays as it is."""
    if prefix is None or rows is None or len(prefix.valid) == 1:
        return prefix
    return Prefix(take_rows(prefix.keys_values, rows), take_rows(prefix.valid, rows))


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
# The logarithm of the softmax's sum, log Z = log z + max_s l_s, is for `join`: what follows from it
# adds w_s / z dL/dlogZ to dL/dl_s.
#
# w is saved for the backward pass, in the dtype of the model. Without the barriers XLA would save
# the float32 copy of it that the forward pass makes.


class Attended(NamedTuple):
    """What queries read: a mean, and the logarithm of the sum that its weights are divided by."""

    mean: Float[Array, "..."]  # [*B, Q, H, K], or [B, H, Q, D] of a source
    log_z: Float[Array, "*B H Q 1"]


@jax.custom_vjp
def attend(
    query: Float[Array, "*B Q H K"],
    key: Float[Array, "*B S H K"],
    value: Float[Array, "*B S H K"],
    bias: Float[Array, "#*B #H Q S"],
) -> Attended:
    """Every query's mean of the values, weighted by softmax(query . key + bias), and log Z."""
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query: Array, key: Array, value: Array, bias: Array) -> tuple[Attended, Any]:
    with jax.named_scope("query-key"):
        logits = einsum("...QHK,...SHK->...HQS", query, key, jnp.float32) + bias
    with jax.named_scope("softmax"):
        weights, scale, log_z = _exponentials(logits, query.dtype)
    with jax.named_scope("values"):
        total = einsum("...HQS,...SHK->...HQK", weights, value, jnp.float32)
        mean = (total * scale).astype(query.dtype).swapaxes(-3, -2)
    return Attended(mean, log_z), (query, key, value, bias, weights, scale, mean)


def _attend_backward(saved: Any, gradients: Attended) -> tuple[Array, ...]:
    query, key, value, bias, weights, scale, mean = jax.lax.optimization_barrier(saved)
    with jax.named_scope("values"):
        gradient = gradients.mean * scale.swapaxes(-3, -2)
        along = (gradient * mean).sum(axis=-1, keepdims=True).swapaxes(-3, -2)
        along = along - scale * gradients.log_z
        gradient = gradient.astype(mean.dtype)
        d_weights = einsum("...QHK,...SHK->...HQS", gradient, value, jnp.float32)
        d_value = einsum("...QHK,...HQS->...HKS", gradient, weights)
    with jax.named_scope("softmax"):
        d_logits = weights * (d_weights - along)
        d_bias = _sum_to(bias.shape, d_logits)
        d_logits = d_logits.astype(mean.dtype)
    with jax.named_scope("query-key"):
        d_query = einsum("...HQS,...SHK->...HQK", d_logits, key)
        d_key = einsum("...QHK,...HQS->...HKS", query, d_logits)
    return d_query.swapaxes(-3, -2), _keys_first(d_key), _keys_first(d_value), d_bias


def _keys_first(x: Float[Array, "*B H K S"]) -> Float[Array, "*B S H K"]:
    return jnp.moveaxis(x, -1, -3)


attend.defvjp(_attend_forward, _attend_backward)


def _exponentials(
    logits: Float[Array, "*B H Q S"], dtype: Any
) -> tuple[Float[Array, "*B H Q S"], Float[Array, "*B H Q 1"], Float[Array, "*B H Q 1"]]:
    """Exponentials in `dtype`, 1 / their sum (the product of both is the softmax), and log Z."""
    most = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - most).astype(dtype)
    total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    return weights, 1.0 / total, jnp.log(total) + most


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
) -> Attended:
    """`attend` where positions are their own keys and values, the same for every head.

    `factor` is what dropout multiplies a head's weights by. Backward, what a position gives as key
    and as value is one product: derived, there are two, of the size of the source, and XLA keeps
    those of many layers.
    """
    return _attend_to_source_forward(query, source, bias, factor)[0]


def _attend_to_source_forward(
    query: Array, source: Array, bias: Array, factor: Array | None
) -> tuple[Attended, Any]:
    with jax.named_scope("query-key"):
        logits = einsum("BHQD,BSD->BHQS", query, source, jnp.float32) + bias
    with jax.named_scope("softmax"):
        weights, scale, log_z = _exponentials(logits, query.dtype)
    with jax.named_scope("values"):
        total = einsum("BHQS,BSD->BHQD", _times(weights, factor), source, jnp.float32)
        mean = (total * scale).astype(query.dtype)
    return Attended(mean, log_z), (query, source, bias, factor, weights, scale, mean)


def _attend_to_source_backward(saved: Any, gradients: Attended) -> tuple[Array | None, ...]:
    query, source, bias, factor, weights, scale, mean = jax.lax.optimization_barrier(saved)
    with jax.named_scope("values"):
        gradient = gradients.mean * scale
        along = (gradient * mean).sum(axis=-1, keepdims=True) - scale * gradients.log_z
        gradient = gradient.astype(mean.dtype)
        d_weights = einsum("BHQD,BSD->BHQS", gradient, source, jnp.float32)
        d_factor = None
        if factor is not None:
            d_factor = (weights * d_weights).sum(axis=-2, keepdims=True)
    with jax.named_scope("softmax"):
        d_logits = weights * (_times(d_weights, factor) - along)
        d_bias = _sum_to(bias.shape, d_logits)
        d_logits = d_logits.astype(mean.dtype)
    with jax.named_scope("query-key"):
        d_query = einsum("BHQS,BSD->BHQD", d_logits, source)
        both = jnp.stack([d_logits, _times(weights, factor)], axis=1)
        d_source = sum_queries(both, jnp.stack([query, gradient], axis=1))
    return d_query, d_source, d_bias, d_factor


attend_to_source.defvjp(_attend_to_source_forward, _attend_to_source_backward)


def _times(weights: Array, factor: Array | None) -> Array:
    return weights if factor is None else weights * factor


def join(
    first: Attended, second: Attended, shape: Callable[[Array], Array] = lambda x: x
) -> Float[Array, "..."]:
    """What queries read of two sets of keys whose weights have one sum, where each had its own.

    The first set has a share of Z1 / (Z1 + Z2) in it. `shape` gives a share, [*B, H, Q, 1], the
    order of the means' axes.
    """
    share = shape(jax.nn.sigmoid(first.log_z - second.log_z))
    return (first.mean * share + second.mean * (1.0 - share)).astype(first.mean.dtype)


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
    it, it would be as large as the weights. Positions beyond a row's length are set to 0, before
    and after: kernels leave their values and gradients undefined.

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
        return attend(query, key, value, bias).mean
    sizes = [rows] * (batch // rows) + [batch % rows] * bool(batch % rows)

    def split(x: Array) -> Sequence[Array]:
        if x.shape[0] != batch:  # the same for all rows
            return [x if rows > 1 else x[0]] * len(sizes)
        parts = jax.lax.split(x, sizes)  # backward it is put together; slices would be added up
        return parts if rows > 1 else [part[0] for part in parts]  # a batch of one is slower

    split_heads = [split(x) for x in (query, key, value, bias)]
    parts = [attend(*part).mean for part in zip(*split_heads, strict=True)]
    return jnp.concatenate(parts) if rows > 1 else jnp.stack(parts)
