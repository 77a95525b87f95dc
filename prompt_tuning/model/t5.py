"""T5 1.1 in Flax Linen: from embeddings and validity masks to logits.

The backbone knows nothing of prompts: `embed` turns tokens into vectors, `encode` and `decode` take
vectors and say which positions are valid. `prompt.py`, the next file, works on what lies between.
The parameter tree is T5X's T5 1.1, name for name, so its checkpoints need no mapping.

Letters: B batch, T input tokens, L target tokens, S what the encoder sees (P + T), D embedding,
H heads, K head size, F MLP width, V vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from prompt_tuning.config import ModelConfig

Params = Mapping[str, Array]  # flat: "encoder/layers_0/attention/query/kernel" -> [D, H*K]
Cache = dict[str, Array]
MASKED = -1e10  # what T5X adds to the attention logit of a masked pair


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


def attention_bias(allowed: Bool[Array, "B Q S"]) -> Float[Array, "B 1 Q S"]:
    """0 where a query may see a key and -1e10 elsewhere."""
    return jnp.where(allowed, 0.0, MASKED)[:, None].astype(jnp.float32)


def _fan_in(
    distribution: Literal["truncated_normal", "normal"] = "truncated_normal", scale: float = 1.0
) -> Any:
    return nn.initializers.variance_scaling(scale, "fan_in", distribution)


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

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        # The scale of the logits sits in the initialiser of the query instead.
        query_init = _fan_in("normal", 1.0 / c.head_dim)
        self.query = _dense(joined, c, query_init)
        self.key = _dense(joined, c, _fan_in("normal"))
        self.value = _dense(joined, c, _fan_in("normal"))
        self.out = _dense(c.embed_dim, c, _fan_in("normal"))
        self.drop = _dropout(c)

    def split_heads(self, x: Float[Array, "B S HK"]) -> Float[Array, "B S H K"]:
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
        *,
        train: bool = False,
    ) -> Float[Array, "B Q D"]:
        """Every query's mean of the values, weighted by softmax(query . key + bias) in float32."""
        key, value = keys_values
        query = self.split_heads(self.query(x))
        logits = jnp.einsum("BQHK,BSHK->BHQS", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(x.dtype)
        # One mask for all queries, as T5 drops.
        weights = self.drop(weights, deterministic=not train)
        attended = jnp.einsum("BHQS,BSHK->BQHK", weights, value)
        return self.out(attended.reshape(*x.shape[:-1], -1))


class Mlp(nn.Module):
    """The gated-GELU block: wo(gelu(wi_0 x) * wi_1 x)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], *, train: bool = False) -> Float[Array, "B S D"]:
        """The block's output, to be added to `x` by the layer."""
        c = self.config
        gate = nn.gelu(_dense(c.mlp_dim, c, _fan_in(), "wi_0")(x), approximate=True)
        hidden = gate * _dense(c.mlp_dim, c, _fan_in(), "wi_1")(x)
        return _dense(c.embed_dim, c, _fan_in(), "wo")(_dropout(c)(hidden, deterministic=not train))


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and added to what came in."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.pre_attention_layer_norm = _norm(c)
        self.attention = Attention(c)
        self.pre_mlp_layer_norm = _norm(c)
        self.mlp = Mlp(c)
        self.drop = _dropout(c)

    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "B H S S"], *, train: bool
    ) -> Float[Array, "B S D"]:
        """The layer's output."""
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, self.attention.keys_values(y), bias, train=train)
        x = x + self.drop(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train=train)
        return x + self.drop(y, deterministic=not train)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each behind a norm and added to what came in."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = _norm(c)
        self.self_attention = Attention(c)
        self.pre_cross_attention_layer_norm = _norm(c)
        self.encoder_decoder_attention = Attention(c)
        self.pre_mlp_layer_norm = _norm(c)
        self.mlp = Mlp(c)
        self.drop = _dropout(c)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        encoded: Float[Array, "B S D"],
        biases: tuple[Float[Array, "#B H L L"], Float[Array, "B 1 L S"]],
        *,
        train: bool,
    ) -> Float[Array, "B L D"]:
        """The layer's output for whole target sequences."""
        self_bias, cross_bias = biases
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, self.self_attention.keys_values(y), self_bias, train=train)
        x = x + self.drop(y, deterministic=not train)
        cross = self.encoder_decoder_attention.keys_values(encoded)
        return self._cross_and_mlp(x, cross, cross_bias, train=train)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        cache: dict[str, Array],
        biases: tuple[Array, Array],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], dict[str, Array]]:
        """The same for the target at `index` alone, given the keys and values of those before."""
        self_bias, cross_bias = biases
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        update = jax.lax.dynamic_update_slice_in_dim
        key = update(cache["self_key"], key, index, axis=1)
        value = update(cache["self_value"], value, index, axis=1)
        x = x + self.self_attention(y, (key, value), self_bias)
        cross = cache["cross_key"], cache["cross_value"]
        x = self._cross_and_mlp(x, cross, cross_bias, train=False)
        return x, cache | {"self_key": key, "self_value": value}

    def _cross_and_mlp(
        self, x: Array, cross: tuple[Array, Array], bias: Array, *, train: bool
    ) -> Array:
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, cross, bias, train=train)
        x = x + self.drop(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train=train)
        return x + self.drop(y, deterministic=not train)


class Encoder(nn.Module):
    """The encoder stack."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=True)
        self.layers = [EncoderLayer(c) for _ in range(c.num_encoder_layers)]
        self.encoder_norm = _norm(c)
        self.drop = _dropout(c)

    def __call__(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"], *, train: bool
    ) -> Float[Array, "B S D"]:
        """Encodes `x`; every valid position sees every valid position."""
        # Invalid queries see nothing (a flat softmax), as in T5X: no valid position reads them.
        allowed = valid[:, :, None] & valid[:, None, :]
        bias = self.relpos_bias(x.shape[1], x.shape[1]) + attention_bias(allowed)
        x = self.drop(x, deterministic=not train)
        for layer in self.layers:
            x = layer(x, bias, train=train)
        return self.drop(self.encoder_norm(x), deterministic=not train)


class Decoder(nn.Module):
    """The decoder stack and the output projection."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=False)
        self.layers = [DecoderLayer(c) for _ in range(c.num_decoder_layers)]
        self.decoder_norm = _norm(c)
        self.drop = _dropout(c)
        self.logits_dense = nn.Dense(
            c.num_embeddings, use_bias=False, dtype=jnp.float32, kernel_init=_fan_in()
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        encoded: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        *,
        target_valid: Bool[Array, "B L"],
        train: bool,
    ) -> Float[Array, "B L V"]:
        """Logits of every target position given the ones before it."""
        length = x.shape[1]
        causal = jnp.tri(length, dtype=bool)[None]
        self_allowed = causal & target_valid[:, :, None] & target_valid[:, None, :]
        cross_allowed = target_valid[:, :, None] & valid[:, None, :]
        self_bias = self.relpos_bias(length, length) + attention_bias(self_allowed)
        cross_bias = attention_bias(cross_allowed)
        x = self.drop(x, deterministic=not train)
        for layer in self.layers:
            x = layer(x, encoded, (self_bias, cross_bias), train=train)
        return self.logits(x, train=train)

    def logits(self, x: Float[Array, "B L D"], *, train: bool = False) -> Float[Array, "B L V"]:
        """float32 logits of the last hidden states."""
        return self.logits_dense(self.drop(self.decoder_norm(x), deterministic=not train))

    def init_cache(
        self, encoded: Float[Array, "B S D"], valid: Bool[Array, "B S"], max_length: int
    ) -> Cache:
        """What decoding keeps: cross-attention's keys and values, and room for the targets'."""
        c = self.config
        room = jnp.zeros((encoded.shape[0], max_length, c.num_heads, c.head_dim), encoded.dtype)
        cross = [layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers]
        return {
            "cross_key": jnp.stack([key for key, _ in cross], axis=1),
            "cross_value": jnp.stack([value for _, value in cross], axis=1),
            "self_key": jnp.stack([room] * len(self.layers), axis=1),
            "self_value": jnp.stack([room] * len(self.layers), axis=1),
            "valid": valid,
        }

    def step(
        self, x: Float[Array, "B 1 D"], cache: Cache, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 V"], Cache]:
        """Logits of the position after `index`, and the cache with `index` filled in."""
        length = cache["self_key"].shape[2]
        relative = jax.lax.dynamic_slice_in_dim(self.relpos_bias(length, length), index, 1, axis=2)
        seen = (jnp.arange(length) <= index)[None, None]
        self_bias = relative + attention_bias(seen)
        cross_bias = attention_bias(cache["valid"][:, None, :])
        layered = ("cross_key", "cross_value", "self_key", "self_value")
        filled = []
        for n, layer in enumerate(self.layers):
            own = {name: cache[name][:, n] for name in layered}
            x, own = layer.step(x, own, (self_bias, cross_bias), index)
            filled.append(own)
        new = {k: jnp.stack([own[k] for own in filled], axis=1) for k in layered[2:]}
        return self.logits(x), cache | new


class T5(nn.Module):
    """T5 1.1: `embed`, `encode`, `decode`, and `init_cache` / `decode_step` for generation."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.token_embedder = nn.Embed(
            c.num_embeddings,
            c.embed_dim,
            dtype=jnp.dtype(c.dtype),
            embedding_init=nn.initializers.normal(1.0),
        )
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows of the embedding table, which encoder and decoder share."""
        return self.token_embedder(tokens)

    def encode(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"], *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """The encoder's output for embedded input of which `valid` positions count."""
        return self.encoder(x, valid, train=train)

    def decode(
        self,
        tokens: Int[Array, "B L"],
        encoded: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        *,
        target_valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Logits of every target, given decoder inputs (the targets shifted right)."""
        if target_valid is None:
            target_valid = jnp.ones(tokens.shape, bool)
        return self.decoder(
            self.embed(tokens), encoded, valid, target_valid=target_valid, train=train
        )

    def init_cache(
        self, encoded: Float[Array, "B S D"], valid: Bool[Array, "B S"], max_length: int
    ) -> Cache:
        """The state of incremental decoding before the first token."""
        return self.decoder.init_cache(encoded, valid, max_length)

    def decode_step(
        self, tokens: Int[Array, "B"], cache: Cache, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after reading `tokens` at position `index`; equals `decode` there."""
        logits, cache = self.decoder.step(self.embed(tokens[:, None]), cache, index)
        return logits[:, 0], cache

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """All of it once, with the tokens as targets too: what initialisation traces."""
        valid = tokens > 0
        return self.decode(tokens, self.encode(self.embed(tokens), valid), valid)


def _dense(features: int, config: ModelConfig, kernel_init: Any, name: str | None = None) -> Any:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=kernel_init,
        name=name,
    )


def _norm(config: ModelConfig) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=jnp.dtype(config.dtype), use_fast_variance=False)


def _dropout(config: ModelConfig) -> nn.Dropout:
    """Dropout with one mask for all positions (axis -2), as T5 drops everywhere."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


# Flat parameters outside, Linen's nested ones inside: these three are the only places that know.


def apply(
    config: ModelConfig,
    params: Params,
    method: str,
    *args: Any,
    dropout_key: PRNGKeyArray | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a method of `T5` with flat parameters.

    `dropout_key` is needed when `train=True` is among the arguments.
    """
    nested = flax.traverse_util.unflatten_dict(dict(params), sep="/")
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return T5(config).apply({"params": nested}, *args, method=method, rngs=rngs, **kwargs)


def init_params(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Array]:
    """Fresh float32 parameters with T5X's initialisers: for pre-training and tests."""
    tokens = jnp.ones((1, 2), jnp.int32)
    nested = cast("dict[str, Any]", T5(config).init(key, tokens))["params"]
    return cast("dict[str, Array]", flax.traverse_util.flatten_dict(nested, sep="/"))


def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every parameter, without making any.

    >>> small = ModelConfig(num_encoder_layers=8, num_decoder_layers=8, num_heads=6, head_dim=64,
    ...                     embed_dim=512, mlp_dim=1024, num_embeddings=32128)
    >>> sum(s.size for s in param_shapes(small).values())
    76961152
    """
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
