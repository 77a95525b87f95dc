"""T5's attention: relative position buckets, their learned bias, and the heads.

`layers.py`, the next file, makes layers of it. Letters as in `t5.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model.device import ANY, Device
from prompt_tuning.model.products import (
    attend_in_parts,
    attend_to_lengths,
    attend_to_source,
    dense_product,
    product,
    rows_at_once,
)

MASKED = -1e10  # what T5X adds to the attention logit of a masked pair
NORM_EPSILON = 1e-6

# A row's positions are marked with booleans, or, where several examples share the row, with the
# number of the example, counted from 1; 0 is padding.
Valid = Bool[Array, "B S"] | Int[Array, "B S"]
TargetValid = Bool[Array, "B L"] | Int[Array, "B L"]


def relative_position_buckets(
    queries: int, keys: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "queries keys"]:
    """The bucket of every (query, key) distance (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each; the other half grow with the logarithm up to
    `max_distance` and the last takes all beyond. Bidirectional attention spends half of both on
    keys that come after the query. Logarithms are in float32, as in T5X: they decide ties.
    """
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
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
    """True where a valid query meets a valid key, in a packed row one of its own example.

    Relative positions need no such care: within an example the distances are what they were.

    >>> sees(jnp.array([[1, 2, 0]]), jnp.array([[1, 2, 2]])).astype(int).tolist()
    [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]
    """
    return (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] > 0)


def attention_bias(allowed: Bool[Array, "B Q S"]) -> Float[Array, "B 1 Q S"]:
    """0 where a query may see a key and -1e10 elsewhere."""
    return jnp.where(allowed, 0.0, MASKED)[:, None].astype(jnp.float32)


def row_lengths(config: ModelConfig, device: Device, valid: Valid) -> Int[Array, "B"] | None:
    """How long rows are, where attention takes lengths (cuDNN's): valid positions come first.

    Raises:
      ConfigError: several examples share a row.
    """
    if device.kind != "gpu" or config.attention != "cudnn":
        return None
    if valid.dtype != bool:
        raise ConfigError(
            "ATTENTION = 'cudnn' takes rows of one example each: set PACK = False or "
            "ATTENTION = 'xla'."
        )
    return valid.sum(axis=-1, dtype=jnp.int32)


# Norm with a backward pass of its own -----------------------------------------------------------
# Derived, it keeps the broadcast of every scale it multiplies by, as large as the activations.


@jax.custom_vjp
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """`x` with rows of mean square 1, times `scale`, which is not broadcast to be kept."""
    return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    return x * (inverse * scale), (x, inverse, scale)


def _rms_norm_backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, inverse, scale = kept
    normed = x * inverse
    scaled = gradient * scale
    along = (scaled * normed).mean(axis=-1, keepdims=True)
    whole = tuple(range(x.ndim - 1))
    return inverse * (scaled - normed * along), (gradient * normed).sum(axis=whole)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RelativePositionBias(nn.Module):
    """One table `rel_embedding` float[H, buckets], shared by all layers of a stack."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int) -> Float[Array, "1 H Q S"]:
        """The learned bias of every head for every pair of positions."""
        c = self.config
        num_buckets = c.relative_attention_num_buckets
        table = self.param(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (c.num_heads, num_buckets),
        )
        buckets = relative_position_buckets(
            queries,
            keys,
            bidirectional=self.bidirectional,
            num_buckets=num_buckets,
            max_distance=c.relative_attention_max_distance,
        )
        return jnp.take(table.astype(jnp.float32), buckets, axis=1)[None]


class Attention(nn.Module):
    """Multi-head attention with additive bias, without scaling by sqrt(K) (T5)."""

    config: ModelConfig
    device: Device = ANY

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        # The scale of the logits sits in the initialiser of the query instead.
        query_init = fan_in("normal", 1.0 / c.head_dim)
        self.query = dense(joined, c, query_init)
        self.key = dense(joined, c, fan_in("normal"))
        self.value = dense(joined, c, fan_in("normal"))
        self.out = dense(c.embed_dim, c, fan_in("normal"))

    def split_heads(self, x: Float[Array, "*S HK"]) -> Float[Array, "*S H K"]:
        """Separates the heads, which T5X's kernels keep joined."""
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

    def keys_values(
        self, source: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        """Keys and values of `source`, computed apart so that decoding can keep them."""
        return self.split_heads(self.key(source)), self.split_heads(self.value(source))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys_values: tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]],
        bias: Float[Array, "#B #H Q S"],
        lengths: Int[Array, "B"] | None = None,
        kept: Bool[Array, "B HS"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """What the heads attend to, joined again.

        With `lengths` the rest of a row is not seen (`row_lengths`), and `bias` is the same for all
        rows; else `bias` says what is seen. `kept` is what dropout leaves of the weights.
        """
        key, value = keys_values
        query = self.split_heads(self.query(x))
        keep = self._keep(kept, value)
        if keep is not None:  # one mask for all queries: a weight that is dropped is a value of 0
            value = value * keep[..., 0, :].swapaxes(1, 2)[..., None]
        if lengths is not None:
            attended = attend_to_lengths(query, key, value, bias, lengths, self.device.kernel)
        else:
            rows = rows_at_once(self.config, self.device, x.shape[0], x.shape[1])
            attended = attend_in_parts(rows, (query, key, value), bias)
        return self.out(attended.reshape(*x.shape[:-1], -1))

    def absorbed(
        self,
        x: Float[Array, "B Q D"],
        source: Float[Array, "B S D"],
        bias: Float[Array, "#B #H Q S"],
        kept: Bool[Array, "B HS"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """The same, with the kernels of key and value multiplied into what few queries there are.

        A query times the key of a position is the query times the kernel, times the position; a
        mean of values is the mean of the positions, times the kernel. No position of `source` has
        a key or value then: `absorbs` says when that is less to compute.
        """
        query = self.split_heads(self.query(x))
        keep = self._keep(kept, source)
        query = product("BQHK,DHK->BHQD", query, self._kernel(self.key))
        seen = attend_to_source(query, source, bias, keep)
        attended = product("BHQD,DHK->BQHK", seen, self._kernel(self.value))
        return self.out(attended.reshape(*x.shape[:-1], -1))

    def _keep(self, kept: Array | None, source: Array) -> Array | None:
        """What dropout multiplies the weights by, [B, H, 1, S]: the same for all queries."""
        if kept is None:
            return None
        ones = jnp.ones((len(kept), 1, kept.shape[1]), source.dtype)
        ones = drop(ones, kept, self.config.dropout_rate)
        return ones.reshape(len(kept), self.config.num_heads, 1, source.shape[1])

    def _kernel(self, projection: nn.Dense) -> Float[Array, "D H K"]:
        kernel: Array = projection.get_variable("params", "kernel")
        return self.split_heads(kernel.astype(self.config.dtype))


def absorbs(config: ModelConfig, queries: int, source: int) -> bool:
    """Whether `absorbed` is less to compute than keys and values, for one row of these lengths.

    It multiplies the queries by the kernels in the place of the source's positions, and makes them
    as wide as the model in each head.

    >>> small = ModelConfig(num_encoder_layers=8, num_decoder_layers=8, num_heads=6, head_dim=64,
    ...                     embed_dim=512, mlp_dim=1024, num_embeddings=32128)
    >>> [absorbs(small, targets, source=228) for targets in (2, 50, 114)]
    [True, True, False]
    """
    width, head = config.embed_dim, config.head_dim
    return queries * (width * head + source * width) < source * (width * head + queries * head)


def take_rows(x: Shaped[Array, "R *D"], rows: Int[Array, "G C"]) -> Shaped[Array, "G*C *D"]:
    """Of each of G equal parts of the rows of `x` those that `rows` counts in it.

    XLA takes them on the device that has the part, where there is a part a device.

    >>> take_rows(jnp.array([10, 11, 12, 13]), jnp.array([[0, 0, 1], [1, 0, 0]])).tolist()
    [10, 10, 11, 13, 12, 12]
    """
    parts = x.reshape(len(rows), -1, *x.shape[1:])
    take = jax.vmap(lambda part, row: part.at[row].get(mode="promise_in_bounds"))
    return take(parts, rows).reshape(-1, *x.shape[1:])


# What every layer is made of ---------------------------------------------------------------------


def fan_in(
    distribution: Literal["truncated_normal", "normal"] = "truncated_normal", scale: float = 1.0
) -> Any:
    """The initialiser of a kernel whose outputs have the variance `scale`."""
    return nn.initializers.variance_scaling(scale, "fan_in", distribution)


def dense(
    features: int, config: ModelConfig, kernel_init: Any, name: str | None = None, out: Any = None
) -> Any:
    """A matrix without a bias (T5 has none); products are in `out`, else the model's dtype."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=kernel_init,
        dot_general=functools.partial(dense_product, dtype=out),
        name=name,
    )


class Norm(nn.Module):
    """T5's layer norm: scaled by the root mean square, not centred; computed in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` with rows of mean square 1, times the learned scale."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32)).astype(self.dtype)


def norm(config: ModelConfig) -> Norm:
    """The norm in the dtype of the model."""
    return Norm(jnp.dtype(config.dtype))


# Dropout -----------------------------------------------------------------------------------------
# In few draws: place by place they took XLA's CPU compiler longer than the rest of a step.

Kept = Mapping[str, Bool[Array, "B _"]]  # by place
Units = Mapping[str, tuple[int, int]]  # by place: what a mesh splits, and how much there is of each


def splits(units: Units) -> list[int]:
    """The ways in which a mesh splits these places, each of which is a draw of its own."""
    return sorted({split for split, _ in units.values()})


def draw_kept(
    config: ModelConfig, keys: Key[Array, "_"], rows: int, units: Units
) -> dict[str, Bool[Array, "B _"]]:
    """What dropout leaves of the units of each place: a mask for each row, as T5 drops.

    It is the same for all positions of a row, and follows from the row's place in the batch, not
    from how many there are. Places of which a mesh splits as many units are one draw, which is cut
    where no device has a part alone: there is a key for each of `splits`.
    """
    drawn: dict[str, Array] = {}
    for key, split in zip(keys, splits(units), strict=True):
        rests = {place: rest for place, (found, rest) in units.items() if found == split}
        shape = (rows, split, sum(rests.values()))
        of_all = jax.random.bernoulli(key, 1.0 - config.dropout_rate, shape)
        ends = np.cumsum([*rests.values()])[:-1].tolist()
        for place, one in zip(rests, jnp.split(of_all, ends, axis=2), strict=True):
            drawn[place] = one.reshape(rows, -1)
    return drawn


def drop(x: Float[Array, "B S W"], kept: Bool[Array, "B W"] | None, rate: float) -> Array:
    """`x` without what is not `kept`; the rest is divided by the share that is kept on average."""
    return x if kept is None else jnp.where(kept[:, None], x / (1.0 - rate), jnp.zeros_like(x))
