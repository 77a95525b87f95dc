"""One token after another: the most probable, or sampled with T5X's temperature, top-k and top-p.

The model is a `step` function, which `decode.py` makes. With the same logits and key a row's
samples are those of T5X's `temperature_sample` for that row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from prompt_tuning.config import Decoding
from prompt_tuning.model import t5

Step = Callable[[Array, t5.Cache, Array], tuple[Array, t5.Cache]]
EOS_ID = 1
NEG_INF = -1.0e7  # of a token that is ruled out, as in T5X
LEAST_TEMPERATURE = 1e-4  # at or below it the most probable token is taken, as in T5X


class State(NamedTuple):
    """The state after `index` tokens; the samples of a row are neighbours."""

    index: Int[Array, ""]
    tokens: Int[Array, "BN L"]
    scores: Float[Array, "BN"]
    done: Bool[Array, "BN"]
    keys: Key[Array, "..."] | None
    cache: t5.Cache


# (logits, keys) -> the next token of every sequence, its score, and the keys of the next draw
Choose = Callable[[Array, Any], tuple[Array, Array, Any]]


def extend(
    step: Step,
    choose: Choose,
    cache: t5.Cache,
    batch: int,
    length: int,
    keys: Key[Array, "..."] | None = None,
) -> tuple[Int[Array, "BN L"], Float[Array, "BN"]]:
    """The tokens that `choose` takes, 0 after end-of-sequence, and the sum of their scores."""

    def more(state: State) -> Array:
        return (state.index < length) & ~state.done.all()

    def body(state: State) -> State:
        last = jnp.where(state.index > 0, state.tokens[:, jnp.maximum(state.index - 1, 0)], 0)
        logits, cache = step(last, state.cache, state.index)
        token, gained, keys = choose(logits, state.keys)
        token = jnp.where(state.done, 0, token).astype(jnp.int32)
        return State(
            state.index + 1,
            state.tokens.at[:, state.index].set(token),
            state.scores + jnp.where(state.done, 0.0, gained),
            state.done | (token == EOS_ID),
            keys,
            cache,
        )

    empty = jnp.zeros((batch, length), jnp.int32)
    scores, done = jnp.zeros(batch, jnp.float32), jnp.zeros(batch, bool)
    end = jax.lax.while_loop(more, body, State(jnp.int32(0), empty, scores, done, keys, cache))
    return end.tokens, end.scores


def greedy(
    step: Step, cache: t5.Cache, batch: int, *, length: int
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """The most probable token at every position, 0 after end-of-sequence, and its sum of log p."""

    def choose(logits: Array, keys: None) -> tuple[Array, Array, None]:
        log_p = jax.nn.log_softmax(logits)
        return log_p.argmax(-1), log_p.max(-1), None

    return extend(step, choose, cache, batch, length)


def row_keys(seed: int, rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """A key for every row, by its number: what it draws does not depend on its neighbours."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)


def temperature_sample(
    step: Step,
    cache: t5.Cache,
    keys: Key[Array, "..."],
    *,
    num_decodes: int,
    length: int,
    decoding: Decoding,
) -> tuple[Int[Array, "B N L"], Float[Array, "B N"]]:
    """`num_decodes` samples of every row, the least probable first, and their log p.

    A sample ends with end-of-sequence and is padded with 0. `keys` has a key for each row, or is a
    single key with which all rows draw together, as in T5X. The scores are log p under the model,
    or under the distribution that is sampled if `rescale_log_probs`. `step` takes a token for each
    sample of each row, [B * N].
    """
    rows = next(iter(cache.values())).shape[0]
    joint = keys.ndim == 0

    def choose(logits: Array, keys: Array) -> tuple[Array, Array, Array]:
        pairs = (jax.random.split if joint else jax.vmap(jax.random.split))(keys)
        now, later = (pairs[0], pairs[1]) if joint else (pairs[:, 0], pairs[:, 1])
        return *_draw(logits, now, decoding), later

    cache = t5.repeat_targets(cache, num_decodes)
    tokens, scores = extend(step, choose, cache, rows * num_decodes, length, keys)
    tokens, scores = tokens.reshape(rows, num_decodes, length), scores.reshape(rows, num_decodes)
    order = jnp.argsort(scores, axis=1)
    return tokens[jnp.arange(rows)[:, None], order], jnp.take_along_axis(scores, order, axis=1)


def _draw(
    logits: Float[Array, "BN V"], keys: Key[Array, "..."], decoding: Decoding
) -> tuple[Int[Array, "BN"], Float[Array, "BN"]]:
    """One token of every sample and its log p."""
    is_greedy = decoding.temperature <= LEAST_TEMPERATURE
    masked = logits if is_greedy else mask_logits(logits, decoding)
    if is_greedy:
        token = logits.argmax(-1)
    elif keys.ndim == 0:
        token = jax.random.categorical(keys, masked)
    else:
        by_row = masked.reshape(keys.shape[0], -1, masked.shape[-1])
        token = jax.vmap(jax.random.categorical)(keys, by_row).reshape(-1)
    if is_greedy and decoding.rescale_log_probs:
        return token, jnp.zeros(token.shape, jnp.float32)
    log_p = jax.nn.log_softmax(masked if decoding.rescale_log_probs else logits)
    return token, jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]


def mask_logits(logits: Float[Array, "BN V"], decoding: Decoding) -> Float[Array, "BN V"]:
    """The logits over the temperature, NEG_INF where top-k or top-p rules a token out.

    Tokens as probable as the least probable token that stays, stay as well.
    """
    scaled = logits / decoding.temperature
    if decoding.topk:
        best, _ = jax.lax.top_k(scaled, min(decoding.topk, scaled.shape[-1]))
        return jnp.where(scaled >= best[:, -1:], scaled, NEG_INF)
    if decoding.topp:
        p = jax.nn.softmax(scaled)
        falling = jnp.flip(jnp.sort(p, axis=-1), axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling  # a token stays while these lack the share
        least = jnp.where(before < decoding.topp, falling, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(p >= least, scaled, NEG_INF)
    return scaled
