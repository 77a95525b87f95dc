"""Beam search over a `step` function, by T5X's rules or by those of Hugging Face transformers.

The two differ in what counts as ended, in the length penalty, and in when a row is done.
`decode.py` calls this with a T5's step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning.decoding.sample import EOS_ID, Step
from prompt_tuning.model import t5
from prompt_tuning.model.attention import take_rows

NEG_INF = -1.0e7  # of an empty beam, as in T5X; finite so that dividing by a length keeps it


class Rules(NamedTuple):
    """The rules in which T5X's beam search and that of transformers differ."""

    penalty: Callable[[Array | int], Array]  # of a length: what a sum of log p is divided by
    best_length: Callable[[Array, int], Array | int]  # (tokens so far, limit): of the best to come
    ends_at_limit: bool  # whether a sequence of full length competes though it has not ended
    ends_anywhere: bool  # whether it may end among all 2K continuations, or the best K alone


def t5x_rules(alpha: float = 0.6) -> Rules:
    """A row is done when no live beam could win at any length."""
    return Rules(lambda n: length_penalty(n, alpha), lambda now, limit: limit + 1, False, True)


def transformers_rules(alpha: float = 1.0) -> Rules:
    """`generate(num_beams=K, length_penalty=alpha)` of transformers 5, early_stopping=False.

    A row is done when no live beam would win if it ended now.
    """
    return Rules(lambda n: jnp.power(jnp.float32(n), alpha), lambda now, limit: now, True, False)


class BeamState(NamedTuple):
    """The state of beam search after `index` tokens; K beams in ascending order of score.

    Sequences carry the begin token in front: L + 1.
    """

    index: Int[Array, ""]
    live: Int[Array, "B K L"]
    live_scores: Float[Array, "B K"]  # log p
    finished: Int[Array, "B K L"]
    finished_scores: Float[Array, "B K"]  # log p / length penalty; NEG_INF where empty
    done: Bool[Array, "B"]
    cache: t5.Cache


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
    rules: Rules,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """The best `beams` sequences, worst first, so `[:, -1]` is the best, and their scores.

    A row in which nothing has ended returns its live beams. `step` takes a token for each beam
    of each row, [B * beams]; the search stops when all rows are done.
    """

    def more(state: BeamState) -> Array:
        return (state.index < length) & ~state.done.all()

    def body(state: BeamState) -> BeamState:
        return _beam_step(step, state, length, rules)

    empty = jnp.zeros((batch, beams, length + 1), jnp.int32)
    start = BeamState(
        jnp.int32(0),
        empty,
        # One live beam; the others are filled by its continuations.
        jnp.full((batch, beams), NEG_INF).at[:, 0].set(0.0),
        empty,
        jnp.full((batch, beams), NEG_INF),
        jnp.zeros(batch, bool),
        t5.repeat_targets(cache, beams),
    )
    end = jax.lax.while_loop(more, body, start)
    any_finished = (end.finished_scores > NEG_INF).any(axis=1)
    tokens = jnp.where(any_finished[:, None, None], end.finished, end.live)[:, :, 1:]
    return tokens, jnp.where(any_finished[:, None], end.finished_scores, end.live_scores)


def _beam_step(step: Step, state: BeamState, length: int, rules: Rules) -> BeamState:
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
    now = state.index + 1
    ended = (token == EOS_ID) | (rules.ends_at_limit & (now >= length))
    competes = ended & (rules.ends_anywhere | (jnp.arange(scores.shape[1]) < beams))

    live_scores, order = _ascending_top(scores + ended * NEG_INF, beams)
    chosen = _take(parent, order)
    cache = cache | {n: take_rows(cache[n], chosen) for n in cache.keys() - t5.PER_ROW}

    # A row that is done does not change: in transformers a longer sequence could still win.
    competes &= ~state.done[:, None]
    ended_scores = scores / rules.penalty(now) + ~competes * NEG_INF
    all_scores = jnp.concatenate([state.finished_scores, ended_scores], axis=1)
    finished_scores, best = _ascending_top(jnp.maximum(all_scores, NEG_INF), beams)
    finished = _take(jnp.concatenate([state.finished, extended], axis=1), best)

    to_come = live_scores[:, -1] / rules.penalty(rules.best_length(now, length))
    worst = finished_scores[:, 0]  # NEG_INF until there are K
    done = state.done | ((worst > NEG_INF) & (worst >= to_come))
    return BeamState(
        now, _take(extended, order), live_scores, finished, finished_scores, done, cache
    )


def _take(x: Array, beam: Int[Array, "B K"]) -> Array:
    """`x[b, beam[b, k]]`, on the device of the row."""
    return jax.vmap(lambda row, index: row[index])(x, beam)


def _ascending_top(scores: Float[Array, "B N"], k: int) -> tuple[Array, Array]:
    best, order = jax.lax.top_k(scores, k)
    return best[:, ::-1], order[:, ::-1]
