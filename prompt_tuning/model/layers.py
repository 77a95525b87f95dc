"""The layers of a T5: dropout, norm, attention, the MLP, and one layer of either stack.

After `attention.py`; `t5.py` stacks them. Letters as in `t5.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from prompt_tuning.config import ModelConfig
from prompt_tuning.model.attention import (
    Attended,
    KeysValues,
    absorbs,
    attend,
    attend_in_parts,
    attend_to_lengths,
    attend_to_source,
    join,
    of_rows,
    put_in_front,
    relative_position_buckets,
    rows_at_once,
    take_rows,
)
from prompt_tuning.model.device import ANY, Device
from prompt_tuning.model.products import dense_product, narrow_heads, widen_heads

NORM_EPSILON = 1e-6
KEYS_VALUES = "keys_values"  # Flax's collection of those that layers compute from their input
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}


# Dropout -----------------------------------------------------------------------------------------
# In few draws: a draw for each place takes XLA's CPU compiler longer than the rest of a step.

DropoutMasks = Mapping[str, Bool[Array, "B _"]]  # by place; True where a unit stays
NO_MASKS: DropoutMasks = {}  # no dropout
# By place: into how many parts a mesh can split its units, and how many units a part has.
MaskSizes = Mapping[str, tuple[int, int]]


def mesh_splits(sizes: MaskSizes) -> list[int]:
    """The numbers of parts of these places, in ascending order: there is a draw for each."""
    return sorted({parts for parts, _ in sizes.values()})


def draw_masks(
    config: ModelConfig, keys: Key[Array, "_"], rows: int, sizes: MaskSizes
) -> dict[str, Bool[Array, "B _"]]:
    """A dropout mask of each place for each row, the same for all positions of the row (as in T5).

    `keys` has a key for each of `mesh_splits`. The masks of a row follow from its number in the
    batch, not from how many rows there are. Places with the same number of parts are one draw,
    which is cut along the units of a part: no device has only some of these.
    """
    masks: dict[str, Array] = {}
    for key, parts in zip(keys, mesh_splits(sizes), strict=True):
        units = {place: size for place, (split, size) in sizes.items() if split == parts}
        shape = (rows, parts, sum(units.values()))
        joined = jax.random.bernoulli(key, 1.0 - config.dropout_rate, shape)
        ends = np.cumsum([*units.values()])[:-1].tolist()
        for place, mask in zip(units, jnp.split(joined, ends, axis=2), strict=True):
            masks[place] = mask.reshape(rows, -1)
    return masks


def drop(x: Float[Array, "B S W"], mask: Bool[Array, "B W"] | None, rate: float) -> Array:
    """`x` with 0 where `mask` is False; the rest is divided by the share that stays on average."""
    return x if mask is None else jnp.where(mask[:, None], x / (1.0 - rate), jnp.zeros_like(x))


# Norm --------------------------------------------------------------------------------------------
#     y = x r s      r = (mean_D x^2 + eps)^-1/2
#
# Backward, with g = dL/dy and n = x r:
#
#     dL/dx = r (g s - n mean_D(g s n))      dL/ds = g n, summed over all positions
#
# The backward pass that JAX derives needs the broadcasts of r and s, as large as the activations.


@jax.custom_vjp
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """`x` with rows of mean square 1, times `scale`."""
    return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    return x * (inverse * scale), (x, inverse, scale)


def _rms_norm_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, inverse, scale = saved
    normed = x * inverse
    scaled = gradient * scale
    mean = (scaled * normed).mean(axis=-1, keepdims=True)
    positions = tuple(range(x.ndim - 1))
    return inverse * (scaled - normed * mean), (gradient * normed).sum(axis=positions)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


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


# Projections and attention ------------------------------------------------------------------------


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


class RelativePositionBias(nn.Module):
    """One table `rel_embedding` float[H, buckets], shared by all layers of a stack."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int, before: int = 0) -> Float[Array, "1 H Q S"]:
        """The learned bias of every head for every pair of positions.

        `before` more keys come first, those of a prefix, and end at position -1.
        """
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
            before=before,
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
        mask: Bool[Array, "B HS"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """The heads' weighted means of the values, joined and projected.

        If there are `lengths` (`row_lengths`), positions beyond them are masked and `bias` is the
        same for all rows; else `bias` has the mask. `mask` is the weights' dropout mask.
        """
        key, value = keys_values
        query = self.split_heads(self.query(x))
        value = _times(value, self._dropout_factor(mask, value.shape[1], value.dtype))
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
        bias: Float[Array, "#B #H Q W"],
        mask: Bool[Array, "B HS"] | None = None,
        prefix: KeysValues | None = None,
    ) -> Float[Array, "B Q D"]:
        """The same for few queries: the kernels of key and value are multiplied into these.

        A query times the key of a position is the query times the kernel, times the position. A
        mean of values is the mean of the positions, times the kernel. So positions of `source`
        need no keys or values; see `absorbs`. Those of a `prefix` are read beside them: W is then
        J + S.
        """
        query = self.split_heads(self.query(x))
        factor = self._dropout_factor(mask, bias.shape[-1], x.dtype)
        before = bias.shape[-1] - source.shape[1]
        wide = widen_heads(query, self._kernel(self.key))
        own = None if factor is None else factor[..., before:]
        seen = attend_to_source(wide, source, bias[..., before:], own)
        narrow = narrow_heads(seen.mean, self._kernel(self.value))
        if prefix is not None:
            key, value = of_rows(prefix, len(x))
            value = _times(value, None if factor is None else factor[..., :before])
            of_prefix = attend(query, key, value, bias[..., :before])
            narrow = join(Attended(narrow, seen.log_z), of_prefix, lambda x: x.swapaxes(1, 2))
        return self.out(narrow.reshape(*x.shape[:-1], -1))

    def _dropout_factor(self, mask: Array | None, source: int, dtype: Any) -> Array | None:
        """What dropout multiplies the weights by, [B, H, 1, S]: the same for all queries."""
        if mask is None:
            return None
        ones = jnp.ones((len(mask), 1, mask.shape[1]), dtype)
        ones = drop(ones, mask, self.config.dropout_rate)
        return ones.reshape(len(mask), self.config.num_heads, 1, source)

    def _kernel(self, projection: nn.Dense) -> Float[Array, "D H K"]:
        kernel: Array = projection.get_variable("params", "kernel")
        return self.split_heads(kernel.astype(self.config.dtype))


def _times(
    value: Float[Array, "B S H K"], factor: Float[Array, "B H 1 S"] | None
) -> Float[Array, "B S H K"]:
    """The values times a factor of their weights, which is the same for all queries."""
    return value if factor is None else value * factor[..., 0, :].swapaxes(1, 2)[..., None]


class Mlp(nn.Module):
    """The MLP: wo(relu(wi x)) in T5 1.0, wo(gelu(wi_0 x) * wi_1 x) in all that came later.

    Each of `mlp_activations` has a kernel of its own; the activated products are multiplied (T5X).
    """

    config: ModelConfig
    device: Device = ANY

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], masks: DropoutMasks = NO_MASKS
    ) -> Float[Array, "B S D"]:
        """The block's output, to be added to `x` by the layer."""
        c = self.config
        names = ["wi"] if len(c.mlp_activations) == 1 else _numbered(len(c.mlp_activations))
        # Processors round to bfloat16 slowly: the factors stay float32 until they are multiplied.
        wide = jnp.float32 if self.device.kind == "processor" else None
        parts = [dense(c.mlp_dim, c, fan_in(), name, wide)(x) for name in names]
        hidden = activate(c.mlp_activations, *parts).astype(c.dtype)
        hidden = drop(hidden, masks.get("hidden"), c.dropout_rate)
        return dense(c.embed_dim, c, fan_in(), "wo")(hidden)


@functools.partial(jax.checkpoint, static_argnums=0)
def activate(names: tuple[str, ...], *parts: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
    """The product of the activated parts.

    The backward pass computes it again: cheaper than to save the values between.
    """
    activated = [ACTIVATIONS[name](part) for name, part in zip(names, parts, strict=True)]
    return functools.reduce(operator.mul, activated)


def _numbered(count: int) -> list[str]:
    return [f"wi_{number}" for number in range(count)]


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and added to what came in."""

    config: ModelConfig
    device: Device = ANY

    def setup(self) -> None:
        c = self.config
        self.pre_attention_layer_norm = norm(c)
        self.attention = Attention(c, self.device)
        self.pre_mlp_layer_norm = norm(c)
        self.mlp = Mlp(c, self.device)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, "#B H S W"],
        lengths: Int[Array, "B"] | None,
        masks: DropoutMasks,
        prefix: KeysValues | None = None,
    ) -> Float[Array, "B S D"]:
        """The layer's output; `bias` and `lengths` as for `Attention`, masks as in `mask_sizes`."""
        rate = self.config.dropout_rate
        y, weights = self.pre_attention_layer_norm(x), masks.get("weights")
        own = self.attention.keys_values(y)
        self.sow(KEYS_VALUES, "own", own)
        y = self.attention(y, put_in_front(prefix, own), bias, lengths, weights)
        x = x + drop(y, masks.get("attended"), rate)
        y = self.mlp(self.pre_mlp_layer_norm(x), masks)
        return x + drop(y, masks.get("output"), rate)

    @staticmethod
    def mask_sizes(config: ModelConfig, source: int) -> MaskSizes:
        """The sizes of the dropout masks of a layer, by place."""
        whole = (1, config.embed_dim)
        return {
            "weights": (config.num_heads, source),
            "attended": whole,
            "hidden": (config.mlp_dim, 1),
            "output": whole,
        }


def _read_prefix(cache: Mapping[str, Array], name: str, queries: int) -> KeysValues | None:
    """A layer's prefix for each of so many queries, of which every row has as many."""
    if f"{name}_key" not in cache:
        return None
    key, value = (cache[f"{name}_{part}"] for part in ("key", "value"))
    if len(key) > 1:
        key, value = (jnp.repeat(x, queries // len(x), axis=0) for x in (key, value))
    return key, value


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each behind a norm and added to what came in."""

    config: ModelConfig
    device: Device = ANY

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = norm(c)
        self.self_attention = Attention(c, self.device)
        self.pre_cross_attention_layer_norm = norm(c)
        self.encoder_decoder_attention = Attention(c, self.device)
        self.pre_mlp_layer_norm = norm(c)
        self.mlp = Mlp(c, self.device)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        encoded: Float[Array, "R S D"],
        biases: tuple[Float[Array, "#B H L _"], Float[Array, "B 1 L _"]],
        rows: Int[Array, "G C"] | None,
        masks: DropoutMasks,
        prefixes: tuple[KeysValues | None, KeysValues | None] = (None, None),
    ) -> Float[Array, "B L D"]:
        """The layer's output for whole target sequences; `rows` as for `T5.decode`.

        `prefixes` are those of self-attention, one for each target or the same for all, and of
        cross-attention, one for each encoded row or the same for all.
        """
        (self_bias, cross_bias), (self_prefix, cross_prefix) = biases, prefixes
        rate, weights = self.config.dropout_rate, masks.get("cross_weights")
        y = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(y)
        self.sow(KEYS_VALUES, "own", own)
        own = put_in_front(self_prefix, own)
        y = self.self_attention(y, own, self_bias, mask=masks.get("self_weights"))
        x = x + drop(y, masks.get("self_attended"), rate)
        y = self.pre_cross_attention_layer_norm(x)
        alone = rows is None and not self.is_initializing()  # which has to make all kernels
        if alone and absorbs(self.config, x.shape[1], encoded.shape[1]):
            y = self.encoder_decoder_attention.absorbed(
                y, encoded, cross_bias, weights, cross_prefix
            )
        else:
            read = self.encoder_decoder_attention.keys_values(encoded)
            key, value = put_in_front(cross_prefix, read)
            if rows is not None:
                key, value = take_rows(key, rows), take_rows(value, rows)
            y = self.encoder_decoder_attention(y, (key, value), cross_bias, mask=weights)
        x = x + drop(y, masks.get("cross_attended"), rate)
        return self._mlp(x, masks)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        cache: dict[str, Array],
        biases: tuple[Array, Array],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], dict[str, Array]]:
        """The output for the target at `index`, and the keys and values with this target's.

        `cache` holds the keys and values of the targets before, and those of the encoder (or its
        output, see `Decoder.init_cache`) once a row: the beams or samples of a row are its queries.
        So are those of prefixes, of which self-attention takes one for each query.
        """
        self_bias, cross_bias = biases
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        update = jax.lax.dynamic_update_slice_in_dim
        key = update(cache["self_key"], key, index, axis=1)
        value = update(cache["self_value"], value, index, axis=1)
        prefix = _read_prefix(cache, "self_prefix", len(x))
        x = x + self.self_attention(y, put_in_front(prefix, (key, value)), self_bias)
        y, cross = self.pre_cross_attention_layer_norm(x), self.encoder_decoder_attention
        y = y.reshape(cross_bias.shape[0], cross_bias.shape[2], -1)
        if "encoded" in cache:
            prefix = _read_prefix(cache, "cross_prefix", len(y))
            y = cross.absorbed(y, cache["encoded"], cross_bias, prefix=prefix)
        else:
            y = cross(y, (cache["cross_key"], cache["cross_value"]), cross_bias)
        x = x + y.reshape(x.shape)
        return self._mlp(x, NO_MASKS), {"self_key": key, "self_value": value}

    def _mlp(self, x: Array, masks: DropoutMasks) -> Array:
        y = self.mlp(self.pre_mlp_layer_norm(x), masks)
        return x + drop(y, masks.get("output"), self.config.dropout_rate)

    @staticmethod
    def mask_sizes(config: ModelConfig, targets: int, source: int) -> MaskSizes:
        """The sizes of the dropout masks of a layer, by place."""
        whole = (1, config.embed_dim)
        return {
            "self_weights": (config.num_heads, targets),
            "self_attended": whole,
            "cross_weights": (config.num_heads, source),
            "cross_attended": whole,
            "hidden": (config.mlp_dim, 1),
            "output": whole,
        }
