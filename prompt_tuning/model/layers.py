"""The layers of a T5: the MLP in its two forms, and one layer of either stack.

After `attention.py`; `t5.py` stacks them. Letters as in `t5.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_tuning.config import ModelConfig
from prompt_tuning.model.attention import (
    Attention,
    Kept,
    Units,
    absorbs,
    dense,
    drop,
    fan_in,
    norm,
    take_rows,
)
from prompt_tuning.model.device import ANY, Device

NOTHING: Kept = {}  # is dropped; a dictionary that JAX knows
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}


class Mlp(nn.Module):
    """The MLP: wo(relu(wi x)) in T5 1.0, wo(gelu(wi_0 x) * wi_1 x) in all that came later.

    Each of `mlp_activations` has a kernel of its own, and what they give is multiplied, as in T5X.
    """

    config: ModelConfig
    device: Device = ANY

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], kept: Kept = NOTHING) -> Float[Array, "B S D"]:
        """The block's output, to be added to `x` by the layer."""
        c = self.config
        names = ["wi"] if len(c.mlp_activations) == 1 else _numbered(len(c.mlp_activations))
        wide = jnp.float32 if self.device.kind == "processor" else None
        parts = [dense(c.mlp_dim, c, fan_in(), name, wide)(x) for name in names]
        hidden = activate(c.mlp_activations, *parts).astype(c.dtype)
        hidden = drop(hidden, kept.get("hidden"), c.dropout_rate)
        return dense(c.embed_dim, c, fan_in(), "wo")(hidden)


@functools.partial(jax.checkpoint, static_argnums=0)
def activate(names: tuple[str, ...], *parts: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
    """The product of the activated parts.

    Backward it is computed again: cheaper than to keep what lies between parts and product.
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
        bias: Float[Array, "#B H S S"],
        lengths: Int[Array, "B"] | None,
        kept: Kept,
    ) -> Float[Array, "B S D"]:
        """The layer's output; `bias` and `lengths` as for `Attention`, `kept` by `units`."""
        rate = self.config.dropout_rate
        y, weights = self.pre_attention_layer_norm(x), kept.get("weights")
        y = self.attention(y, self.attention.keys_values(y), bias, lengths, weights)
        x = x + drop(y, kept.get("attended"), rate)
        y = self.mlp(self.pre_mlp_layer_norm(x), kept)
        return x + drop(y, kept.get("output"), rate)

    @staticmethod
    def units(config: ModelConfig, source: int) -> Units:
        """Where T5 drops out, and of what."""
        whole = (1, config.embed_dim)
        return {
            "weights": (config.num_heads, source),
            "attended": whole,
            "hidden": (config.mlp_dim, 1),
            "output": whole,
        }


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
        biases: tuple[Float[Array, "#B H L L"], Float[Array, "B 1 L S"]],
        rows: Int[Array, "G C"] | None,
        kept: Kept,
    ) -> Float[Array, "B L D"]:
        """The layer's output for whole target sequences; `rows` as for `T5.decode`."""
        self_bias, cross_bias = biases
        rate, weights = self.config.dropout_rate, kept.get("cross_weights")
        y = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(y)
        y = self.self_attention(y, own, self_bias, kept=kept.get("self_weights"))
        x = x + drop(y, kept.get("self_attended"), rate)
        y = self.pre_cross_attention_layer_norm(x)
        alone = rows is None and not self.is_initializing()  # which has to make all kernels
        if alone and absorbs(self.config, x.shape[1], encoded.shape[1]):
            y = self.encoder_decoder_attention.absorbed(y, encoded, cross_bias, weights)
        else:
            key, value = self.encoder_decoder_attention.keys_values(encoded)
            if rows is not None:
                key, value = take_rows(key, rows), take_rows(value, rows)
            y = self.encoder_decoder_attention(y, (key, value), cross_bias, kept=weights)
        x = x + drop(y, kept.get("cross_attended"), rate)
        return self._mlp(x, kept)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        cache: dict[str, Array],
        biases: tuple[Array, Array],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], dict[str, Array]]:
        """The same for the target at `index` alone, and the cache's part of it.

        `cache` holds the keys and values of the targets before, and what `Decoder.init_cache` has
        put there of the encoder's, once a row: the beams or samples of a row are so many queries.
        """
        self_bias, cross_bias = biases
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        update = jax.lax.dynamic_update_slice_in_dim
        key = update(cache["self_key"], key, index, axis=1)
        value = update(cache["self_value"], value, index, axis=1)
        x = x + self.self_attention(y, (key, value), self_bias)
        y, cross = self.pre_cross_attention_layer_norm(x), self.encoder_decoder_attention
        y = y.reshape(cross_bias.shape[0], cross_bias.shape[2], -1)
        if "encoded" in cache:
            y = cross.absorbed(y, cache["encoded"], cross_bias)
        else:
            y = cross(y, (cache["cross_key"], cache["cross_value"]), cross_bias)
        x = x + y.reshape(x.shape)
        return self._mlp(x, NOTHING), {"self_key": key, "self_value": value}

    def _mlp(self, x: Array, kept: Kept) -> Array:
        y = self.mlp(self.pre_mlp_layer_norm(x), kept)
        return x + drop(y, kept.get("output"), self.config.dropout_rate)

    @staticmethod
    def units(config: ModelConfig, targets: int, source: int) -> Units:
        """Where T5 drops out, and of what."""
        whole = (1, config.embed_dim)
        return {
            "self_weights": (config.num_heads, targets),
            "self_attended": whole,
            "cross_weights": (config.num_heads, source),
            "cross_attended": whole,
            "hidden": (config.mlp_dim, 1),
            "output": whole,
        }
