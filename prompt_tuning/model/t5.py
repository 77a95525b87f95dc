"""T5 in Flax Linen: from embeddings and validity masks to logits.

The backbone knows nothing of prompts: `embed` turns tokens into vectors, `encode` and `decode` take
vectors and a mask of valid positions. `prompt.py`, the next file, works between the two.
The parameter tree is T5X's, name for name, so its checkpoints need no mapping. The families differ
in two settings: `mlp_activations`, and `logits_via_embedding` (T5 1.0 reads its logits off the
embedding table; the others have `logits_dense`). The layers are in `attention.py` and `layers.py`.

Letters: B batch, R encoded rows, T input tokens, L target tokens, S what the encoder sees (P + T),
D embedding, H heads, K head size, F MLP width, V vocabulary, N layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from prompt_tuning.config import ModelConfig
from prompt_tuning.model.attention import (
    Prefix,
    TargetValid,
    Valid,
    absorbs,
    attention_bias,
    prefix_length,
    put_in_front,
    row_lengths,
    sees,
    sees_prefix,
    split_layers,
    take_prefix,
    take_rows,
)
from prompt_tuning.model.device import ANY, Device
from prompt_tuning.model.layers import (
    KEYS_VALUES,
    NO_MASKS,
    DecoderLayer,
    DropoutMasks,
    EncoderLayer,
    MaskSizes,
    RelativePositionBias,
    draw_masks,
    drop,
    fan_in,
    mesh_splits,
    norm,
)
from prompt_tuning.model.products import dense_product

Params = Mapping[str, Array]  # flat: "encoder/layers_0/attention/query/kernel" -> [D, H*K]
Cache = dict[str, Array]
# Entries that are the same for all targets of a row; prefixes may be the same for all rows.
PER_ROW = frozenset(
    {"encoded", "cross_key", "cross_value", "valid", "prefix_valid"}
    | {f"{name}_prefix_{part}" for name in ("self", "cross") for part in ("key", "value")}
)


def repeat_targets(cache: Cache, times: int) -> Cache:
    """The cache for `times` targets a row, one after another; entries of a row are not repeated."""
    return {
        name: leaf if name in PER_ROW else jnp.repeat(leaf, times, axis=0)
        for name, leaf in cache.items()
    }


_logits = functools.partial(dense_product, dtype=jnp.float32)

_ONCE = {
    method: nn.jit(method)
    for method in (EncoderLayer.__call__, DecoderLayer.__call__, DecoderLayer.step)
}


def _once(stack: nn.Module, method: Callable[..., Any], x: Array) -> Callable[..., Any]:
    """A layer's method; if `x` is traced, one that is traced once for all layers of a stack.

    Layers of a stack differ in their arrays alone, and tracing each takes most of the time of
    tracing. Initial values are drawn without it: Flax would draw others for the same seed.
    """
    return _ONCE[method] if isinstance(x, Tracer) and not stack.is_initializing() else method


def _draw_masks(
    stack: Encoder | Decoder, rows: int, sizes: MaskSizes, *, train: bool
) -> tuple[DropoutMasks, list[DropoutMasks]]:
    """The dropout masks before and after the layers of a stack, and those of each layer.

    A loop draws for one layer after another, so that the draws are compiled once, and returns the
    masks of each as arrays of their own. If they were cut from an array of all layers, XLA would
    cut within each operation that reads them, and compile that anew for every layer.
    """
    config, layers = stack.config, len(stack.layers)
    if not train or config.dropout_rate == 0.0:
        return NO_MASKS, [NO_MASKS] * layers
    keys = jax.random.split(stack.make_rng("dropout"), (layers + 1, len(mesh_splits(sizes))))
    width = (1, config.embed_dim)
    ends = draw_masks(config, keys[0, :1], rows, {"first": width, "last": width})

    def draw(masks: list[DropoutMasks], keys: Array) -> tuple[list[DropoutMasks], None]:
        return [*masks[1:], draw_masks(config, keys, rows, sizes)], None

    none = {place: jnp.zeros((rows, parts * size), bool) for place, (parts, size) in sizes.items()}
    return ends, jax.lax.scan(draw, [none] * layers, keys[1:])[0]


class Encoder(nn.Module):
    """The encoder stack."""

    config: ModelConfig
    device: Device

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=True)
        self.layers = [EncoderLayer(c, self.device) for _ in range(c.num_encoder_layers)]
        self.encoder_norm = norm(c)

    def __call__(
        self, x: Float[Array, "B S D"], valid: Valid, prefix: Prefix | None, *, train: bool
    ) -> Float[Array, "B S D"]:
        """Encodes `x`; every valid position sees every valid position, those of the prefix too."""
        c, before = self.config, prefix_length(prefix)
        # Invalid queries see nothing (a flat softmax), as in T5X: no valid position reads them.
        bias = self.relpos_bias(x.shape[1], x.shape[1], before)
        lengths = row_lengths(c, self.device, valid, before)
        if lengths is None:
            bias = bias + attention_bias(sees_prefix(prefix, valid, sees(valid, valid)))
        sizes = EncoderLayer.mask_sizes(c, before + x.shape[1])
        ends, masks = _draw_masks(self, len(x), sizes, train=train)
        x = drop(x, ends.get("first"), c.dropout_rate)
        call = _once(self, EncoderLayer.__call__, x)
        prefixes = split_layers(prefix, len(self.layers), x.dtype)
        for layer, own, front in zip(self.layers, masks, prefixes, strict=True):
            x = call(layer, x, bias, lengths, own, front)
        return drop(self.encoder_norm(x), ends.get("last"), c.dropout_rate)


class Decoder(nn.Module):
    """The decoder stack and the output projection."""

    config: ModelConfig
    device: Device
    token_embedder: nn.Embed  # shared with the input; its table is the projection of T5 1.0

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=False)
        self.layers = [DecoderLayer(c, self.device) for _ in range(c.num_decoder_layers)]
        self.decoder_norm = norm(c)
        if not c.logits_via_embedding:
            self.logits_dense = nn.Dense(
                c.num_embeddings, use_bias=False, dot_general=_logits, kernel_init=fan_in()
            )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        encoded: Float[Array, "R S D"],
        valid: Bool[Array, "R S"] | Int[Array, "R S"],
        *,
        prefix: Prefix | None,
        cross: Prefix | None,
        target_valid: TargetValid,
        rows: Int[Array, "G C"] | None,
        train: bool,
    ) -> Float[Array, "B L V"]:
        """Logits of every target position given the ones before it."""
        c, length = self.config, x.shape[1]
        targets = -(-x.shape[0] * length // len(encoded))  # of an encoded row
        prefix, of_targets = take_prefix(prefix, rows), take_prefix(cross, rows)
        if rows is not None and absorbs(c, targets, encoded.shape[1]):
            # Less than to compute keys and values, though a row is there once for each target.
            encoded, valid, rows = take_rows(encoded, rows), take_rows(valid, rows), None
            cross = of_targets
        causal = jnp.tri(length, dtype=bool)[None]
        self_allowed = causal & sees(target_valid, target_valid)
        cross_allowed = sees(target_valid, valid if rows is None else take_rows(valid, rows))
        before = prefix_length(prefix)
        self_bias = self.relpos_bias(length, length, before)
        self_bias = self_bias + attention_bias(sees_prefix(prefix, target_valid, self_allowed))
        cross_bias = attention_bias(sees_prefix(of_targets, target_valid, cross_allowed))
        sizes = DecoderLayer.mask_sizes(c, before + length, cross_bias.shape[-1])
        ends, masks = _draw_masks(self, len(x), sizes, train=train)
        x = drop(x, ends.get("first"), c.dropout_rate)
        call = _once(self, DecoderLayer.__call__, x)
        fronts = zip(
            *(split_layers(front, len(self.layers), x.dtype) for front in (prefix, cross)),
            strict=True,
        )
        for layer, own, front in zip(self.layers, masks, fronts, strict=True):
            x = call(layer, x, encoded, (self_bias, cross_bias), rows, own, front)
        return self.logits(x, ends.get("last"))

    @jax.named_scope("logits")
    def logits(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B D"] | None = None
    ) -> Float[Array, "B L V"]:
        """float32 logits of the last hidden states."""
        x = drop(self.decoder_norm(x), mask, self.config.dropout_rate)
        if not self.config.logits_via_embedding:
            return self.logits_dense(x)
        # The table has rows of norm sqrt(D), which a kernel of its own would not (Mesh TensorFlow).
        table = self.token_embedder.embedding
        wide = jnp.promote_types(x.dtype, table.dtype)
        return _logits(x.astype(wide), table.T.astype(wide)) / math.sqrt(x.shape[-1])

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        max_length: int,
        num_decodes: int,
        prefix: Prefix | None,
        cross: Prefix | None,
    ) -> Cache:
        """The cache of decoding: what cross-attention reads, and room for the targets' own keys.

        Cross-attention reads the encoder's output, the same for all layers, or, if the targets are
        long or many (`absorbs`), its keys and values in every layer. Neither is repeated for the
        targets of a row; `repeat_targets` makes room for those. Prefixes are not repeated either.
        """
        c, dtype = self.config, encoded.dtype
        room = jnp.zeros((encoded.shape[0], max_length, c.num_heads, c.head_dim), dtype)
        own = jnp.stack([room] * len(self.layers), axis=1)
        everywhere = jnp.ones((len(encoded), 1), jnp.int32)  # a query that sees every prefix
        seen = sees_prefix(cross, everywhere, valid[:, None])[:, 0]
        cache = {"self_key": own, "self_value": own, "valid": seen}
        absorbed = absorbs(c, max_length * num_decodes, encoded.shape[1])
        for name, front in (("self", prefix), ("cross", cross if absorbed else None)):
            if front is not None:
                for n, part in enumerate(("key", "value")):
                    cache[f"{name}_prefix_{part}"] = front.keys_values[:, :, n].astype(dtype)
        if prefix is not None:
            cache["prefix_valid"] = prefix.valid
        if absorbed:
            return cache | {"encoded": encoded}
        fronts = split_layers(cross, len(self.layers), dtype)
        read = [
            put_in_front(front, layer.encoder_decoder_attention.keys_values(encoded))
            for layer, front in zip(self.layers, fronts, strict=True)
        ]
        return cache | {
            "cross_key": jnp.stack([key for key, _ in read], axis=1),
            "cross_value": jnp.stack([value for _, value in read], axis=1),
        }

    def cross_keys_values(self, memory: Float[Array, "B J D"]) -> Float[Array, "B N 2 J H K"]:
        """The keys and values of cross-attention in every layer for these encoded positions."""
        read = [layer.encoder_decoder_attention.keys_values(memory) for layer in self.layers]
        return jnp.stack([jnp.stack(keys_values, axis=1) for keys_values in read], axis=1)

    def step(
        self, x: Float[Array, "BN 1 D"], cache: Cache, index: Int[Array, ""]
    ) -> tuple[Float[Array, "BN 1 V"], Cache]:
        """Logits of the position after `index`, and the cache with `index` filled in."""
        length = cache["self_key"].shape[2]
        before = cache["prefix_valid"] if "prefix_valid" in cache else jnp.ones((1, 0), bool)
        if len(before) > 1:  # for each target of a row
            before = jnp.repeat(before, len(x) // len(before), axis=0)
        bias = self.relpos_bias(length, length, before.shape[1])
        relative = jax.lax.dynamic_slice_in_dim(bias, index, 1, axis=2)
        seen = jnp.broadcast_to(jnp.arange(length) <= index, (len(before), length))
        self_bias = relative + attention_bias(jnp.concatenate([before, seen], axis=1)[:, None])
        rows, source = cache["valid"].shape
        targets = jnp.broadcast_to(cache["valid"][:, None], (rows, x.shape[0] // rows, source))
        cross_bias = attention_bias(targets)
        layered = cache.keys() - {"encoded", "valid", "prefix_valid"}
        filled, call = [], _once(self, DecoderLayer.step, x)
        for n, layer in enumerate(self.layers):
            own = {name: cache[name][:, n] if name in layered else cache[name] for name in cache}
            x, own = call(layer, x, own, (self_bias, cross_bias), index)
            filled.append(own)
        new = {k: jnp.stack([own[k] for own in filled], axis=1) for k in ("self_key", "self_value")}
        return self.logits(x), cache | new


class T5(nn.Module):
    """A T5: `embed`, `encode`, `decode`, and `init_cache` / `decode_step` for generation.

    The module itself holds no arrays: as sizes and the way they are computed, it is the first
    argument of everything that computes.
    """

    config: ModelConfig
    device: Device = ANY

    def setup(self) -> None:
        c = self.config
        self.token_embedder = nn.Embed(
            c.num_embeddings,
            c.embed_dim,
            dtype=jnp.dtype(c.dtype),
            embedding_init=nn.initializers.normal(1.0),
        )
        self.encoder = Encoder(c, self.device)
        self.decoder = Decoder(c, self.device, self.token_embedder)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows of the embedding table, which encoder and decoder share."""
        return self.token_embedder(tokens)

    def encode(
        self,
        x: Float[Array, "B S D"],
        valid: Valid,
        *,
        prefix: Prefix | None = None,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """The encoder's output for embedded input of which `valid` positions count."""
        return self.encoder(x, valid, prefix, train=train)

    def cross_keys_values(self, memory: Float[Array, "B J D"]) -> Float[Array, "B N 2 J H K"]:
        """The keys and values of cross-attention in every layer for these encoded positions."""
        return self.decoder.cross_keys_values(memory)

    def decode(
        self,
        tokens: Int[Array, "B L"],
        encoded: Float[Array, "R S D"],
        valid: Bool[Array, "R S"] | Int[Array, "R S"],
        *,
        prefix: Prefix | None = None,
        cross: Prefix | None = None,
        target_valid: TargetValid | None = None,
        rows: Int[Array, "G C"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Logits of every target, given decoder inputs (the targets shifted right).

        `prefix` is that of self-attention, `cross` that of cross-attention, for each encoded row.

        If several targets share an encoded row, `rows` has the row of each target, and keys and
        values of a row are computed once; without `rows`, target and row are one to one. Rows are
        split into G equal parts, each with C targets, and `rows` counts from a part's first row:
        with one part a device, no device needs the rows of another.
        """
        return self.decode_embedded(
            self.embed(tokens),
            encoded,
            valid,
            prefix=prefix,
            cross=cross,
            target_valid=target_valid,
            rows=rows,
            train=train,
        )

    def decode_embedded(
        self,
        x: Float[Array, "B L D"],
        encoded: Float[Array, "R S D"],
        valid: Bool[Array, "R S"] | Int[Array, "R S"],
        *,
        prefix: Prefix | None = None,
        cross: Prefix | None = None,
        target_valid: TargetValid | None = None,
        rows: Int[Array, "G C"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """`decode` of embedded decoder inputs."""
        return self.decoder(
            x,
            encoded,
            valid,
            prefix=prefix,
            cross=cross,
            target_valid=jnp.ones(x.shape[:2], bool) if target_valid is None else target_valid,
            rows=rows,
            train=train,
        )

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        max_length: int,
        num_decodes: int = 1,
        *,
        prefix: Prefix | None = None,
        cross: Prefix | None = None,
    ) -> Cache:
        """The state of incremental decoding before the first token, with room for one target a row.

        `num_decodes` is how many each row will have (`repeat_targets`).
        """
        return self.decoder.init_cache(encoded, valid, max_length, num_decodes, prefix, cross)

    def decode_step(
        self, tokens: Int[Array, "BN"], cache: Cache, index: Int[Array, ""]
    ) -> tuple[Float[Array, "BN V"], Cache]:
        """Logits after reading `tokens` at position `index`; equals `decode` there."""
        logits, cache = self.decoder.step(self.embed(tokens[:, None]), cache, index)
        return logits[:, 0], cache

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """All of it once, with the tokens as targets too: what initialisation traces."""
        valid = tokens > 0
        return self.decode(tokens, self.encode(self.embed(tokens), valid), valid)


# Flat parameters outside, Linen's nested ones inside: these four are the only places that know.


def apply(
    model: T5,
    params: Params,
    method: str,
    *args: Any,
    dropout_key: PRNGKeyArray | None = None,
    mutable: Any = False,
    **kwargs: Any,
) -> Any:
    """Calls a method of `T5` with flat parameters.

    `dropout_key` is needed when `train=True` is among the arguments.
    """
    nested = flax.traverse_util.unflatten_dict(dict(params), sep="/")
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(
        {"params": nested}, *args, method=method, rngs=rngs, mutable=mutable, **kwargs
    )


def encode_keys_values(
    model: T5,
    params: Params,
    x: Float[Array, "B S D"],
    valid: Valid,
    *,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B N 2 S H K"]]:
    """The encoder's output, and the keys and values that its layers compute on the way.

    As the prefix of another input they stand for `x`, where `x` does not see that input.
    """
    train = dropout_key is not None
    states, kept = apply(
        model, params, "encode", x, valid, train=train, dropout_key=dropout_key, mutable=KEYS_VALUES
    )
    return states, _stack_layers(kept[KEYS_VALUES]["encoder"])


def decode_keys_values(
    model: T5,
    params: Params,
    x: Float[Array, "B L D"],
    encoded: Float[Array, "B S D"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N 2 L H K"]:
    """The keys and values that the decoder's self-attention computes of these embedded targets."""
    _, kept = apply(model, params, "decode_embedded", x, encoded, valid, mutable=KEYS_VALUES)
    return _stack_layers(kept[KEYS_VALUES]["decoder"])


def _stack_layers(kept: Mapping[str, Any]) -> Float[Array, "B N 2 S H K"]:
    layers = [kept[f"layers_{n}"]["own"][0] for n in range(len(kept))]
    return jnp.stack([jnp.stack(keys_values, axis=1) for keys_values in layers], axis=1)


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
    return dict(_param_shapes(config))


@functools.cache  # a run asks in several places
def _param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    # The layers of a stack are alike: one of each is traced, in 0.1 s where 24 would take 2.
    one = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for name, shape in jax.eval_shape(lambda: init_params(one, jax.random.key(0))).items():
        stack = name.split("/")[0]
        count = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
        layers = range(count[stack] if "/layers_0/" in name else 1)
        shapes |= {name.replace("layers_0", f"layers_{n}"): shape for n in layers}
    return shapes
