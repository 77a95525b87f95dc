"""From encoded input to generated tokens: greedy and beam search with T5X's semantics.

Both search over a `step` function, so they know nothing of T5, as `sample.py` does not;
`generate_all` joins the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from prompt_tuning.config import BEAM, Decoding, ModelConfig
from prompt_tuning.model import prompt as prompts
from prompt_tuning.model import t5
from prompt_tuning.model.sample import EOS_ID, Step, temperature_sample

NEG_INF = -1.0e7  # of an empty beam, as in T5X; finite so that dividing by a length keeps it
# Equal for all beams of a row, so never reordered.
_PER_ROW = frozenset({"cross_key", "cross_value", "valid"})


class GreedyState(NamedTuple):
    """Where the greedy search stands."""

    index: Int[Array, ""]
    tokens: Int[Array, "B L"]
    scores: Float[Array, "B"]
    done: Bool[Array, "B"]
    cache: t5.Cache


class BeamState(NamedTuple):
    """Where the beam search stands; beams in ascending order of score, K of them.

    Sequences carry the begin token in front: L + 1.
    """

    index: Int[Array, ""]
    live: Int[Array, "B K L"]
    live_scores: Float[Array, "B K"]  # log p
    finished: Int[Array, "B K L"]
    finished_scores: Float[Array, "B K"]  # log p / length penalty; NEG_INF where empty
    cache: t5.Cache


def greedy(
    step: Step, cache: t5.Cache, batch: int, *, length: int
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """The most probable token at every position, 0 after end-of-sequence, and its sum of log p."""

    def more(state: GreedyState) -> Array:
        return (state.index < length) & ~state.done.all()

    def body(state: GreedyState) -> GreedyState:
        last = jnp.where(state.index > 0, state.tokens[:, jnp.maximum(state.index - 1, 0)], 0)
        logits, cache = step(last, state.cache, state.index)
        log_p = jax.nn.log_softmax(logits)
        token = jnp.where(state.done, 0, log_p.argmax(-1)).astype(jnp.int32)
        gained = jnp.where(state.done, 0.0, log_p.max(-1))
        return GreedyState(
            state.index + 1,
            state.tokens.at[:, state.index].set(token),
            state.scores + gained,
            state.done | (token == EOS_ID),
            cache,
        )

    start = GreedyState(
        jnp.int32(0),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros(batch, jnp.float32),
        jnp.zeros(batch, bool),
        cache,
    )
    end = jax.lax.while_loop(more, body, start)
    return end.tokens, end.scores


def length_penalty(length: Array | int, alpha: float) -> Array:
    """What a log probability is divided by: ((5 + length) / 6)^alpha (Wu et al. 2016, 7)."""
    return jnp.power((5.0 + length) / 6.0, alpha)


def beam_search(
    step: Step,
    cache: t5.Cache,
    batch: int,
    *,
    beams: int,
    length: int,
    alpha: float = 0.6,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """The best `beams` sequences, worst first, so `[:, -1]` is the best, and their scores.

    A row in which nothing reached end-of-sequence returns its live beams. `step` takes rows
    repeated for each beam, [B * beams]; the search stops early once no live beam can win.
    """

    def more(state: BeamState) -> Array:
        best_live = state.live_scores[:, -1:] / length_penalty(length + 1, alpha)
        full = state.finished_scores > NEG_INF
        worst = jnp.where(full, state.finished_scores.min(axis=1, keepdims=True), NEG_INF)
        return (state.index < length) & ~(worst > best_live).all()

    def body(state: BeamState) -> BeamState:
        return _beam_step(step, state, alpha=alpha)

    empty = jnp.zeros((batch, beams, length + 1), jnp.int32)
    start = BeamState(
        jnp.int32(0),
        empty,
        # One live beam; the others are filled by its continuations.
        jnp.full((batch, beams), NEG_INF).at[:, 0].set(0.0),
        empty,
        jnp.full((batch, beams), NEG_INF),
        {name: jnp.repeat(leaf, beams, axis=0) for name, leaf in cache.items()},
    )
    end = jax.lax.while_loop(more, body, start)
    any_finished = (end.finished_scores > NEG_INF).any(axis=1)
    tokens = jnp.where(any_finished[:, None, None], end.finished, end.live)[:, :, 1:]
    return tokens, jnp.where(any_finished[:, None], end.finished_scores, end.live_scores)


def _beam_step(step: Step, state: BeamState, *, alpha: float) -> BeamState:
    """One more token: 2K continuations, of which the K best go on and the ended ones compete."""
    batch, beams, _ = state.live.shape
    last = state.live[:, :, state.index].reshape(batch * beams)
    logits, cache = step(last, state.cache, state.index)
    vocab = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits).reshape(batch, beams, vocab)
    total = (log_p + state.live_scores[..., None]).reshape(batch, beams * vocab)
    # 2K: even if K of them end here, K are left to go on.
    scores, flat = jax.lax.top_k(total, min(2 * beams, beams * vocab))
    parent, token = flat // vocab, (flat % vocab).astype(jnp.int32)
    extended = _take(state.live, parent).at[:, :, state.index + 1].set(token)
    ended = token == EOS_ID

    live_scores, order = _ascending_top(scores + ended * NEG_INF, beams)
    chosen = _take(parent, order)
    rows = (jnp.arange(batch)[:, None] * beams + chosen).reshape(-1)
    cache = {
        name: leaf if name in _PER_ROW else jnp.take(leaf, rows, axis=0)
        for name, leaf in cache.items()
    }

    ended_scores = scores / length_penalty(state.index + 1, alpha) + ~ended * NEG_INF
    all_scores = jnp.concatenate([state.finished_scores, ended_scores], axis=1)
    finished_scores, best = _ascending_top(jnp.maximum(all_scores, NEG_INF), beams)
    finished = _take(jnp.concatenate([state.finished, extended], axis=1), best)
    return BeamState(
        state.index + 1, _take(extended, order), live_scores, finished, finished_scores, cache
    )


def _take(x: Array, beam: Int[Array, "B K"]) -> Array:
    """`x[b, beam[b, k]]`."""
    return x[jnp.arange(x.shape[0])[:, None], beam]


def _ascending_top(scores: Float[Array, "B N"], k: int) -> tuple[Array, Array]:
    best, order = jax.lax.top_k(scores, k)
    return best[:, ::-1], order[:, ::-1]


class Search(NamedTuple):
    """What is looked for: how many tokens at most, how many answers, and how."""

    length: int
    num_decodes: int = 1
    decoding: Decoding = BEAM


def generate(
    config: ModelConfig,
    backbone: t5.Params,
    prompt: Float[Array, "P D"],
    tokens: Int[Array, "B T"],
    *,
    length: int,
    num_decodes: int = 1,
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """The best output of every row, at most `length` tokens, and its score.

    One beam is greedy decoding (score: log p), more are beam search with T5X's alpha of 0.6.
    """
    encoded = prompts.encode_prompted(config, backbone, prompt, tokens)
    sequences, scores = generate_all(config, backbone, encoded, Search(length, num_decodes))
    return sequences[:, -1], scores[:, -1]


def generate_all(
    config: ModelConfig,
    backbone: t5.Params,
    encoded: tuple[Float[Array, "B S D"], Bool[Array, "B S"]],
    search: Search,
    keys: Key[Array, "B"] | None = None,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """All beams or samples of every row, the best last, and their scores.

    `encoded` is the encoder's output and its validity; `keys` are needed to sample.
    """
    length, num_decodes, decoding = search
    cache = t5.apply(config, backbone, "init_cache", *encoded, length)
    batch = encoded[0].shape[0]

    def step(last: Array, cache: t5.Cache, index: Array) -> tuple[Array, t5.Cache]:
        return t5.apply(config, backbone, "decode_step", last, cache, index)

    if decoding.method == "sample":
        assert keys is not None, "sampling needs a key for each row"
        return temperature_sample(
            step, cache, keys, num_decodes=num_decodes, length=length, decoding=decoding
        )
    if num_decodes == 1:
        tokens, scores = greedy(step, cache, batch, length=length)
        return tokens[:, None], scores[:, None]
    return beam_search(step, cache, batch, beams=num_decodes, length=length, alpha=decoding.alpha)
