"""From encoded input to generated tokens: greedy decoding, and the choice of the method.

Greedy decoding, `beam.py` and `sample.py` search over a `step` function and know nothing of T5;
`generate_all` joins the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from prompt_tuning.config import BEAM, Decoding
from prompt_tuning.decoding import beam
from prompt_tuning.decoding.sample import EOS_ID, Step, temperature_sample
from prompt_tuning.model import prompt as prompts
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Encoded, Prompt


class GreedyState(NamedTuple):
    """The state of greedy decoding after `index` tokens."""

    index: Int[Array, ""]
    tokens: Int[Array, "B L"]
    scores: Float[Array, "B"]
    done: Bool[Array, "B"]
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


class Search(NamedTuple):
    """At most how many tokens, how many sequences a row, and by which method."""

    length: int
    num_decodes: int = 1
    decoding: Decoding = BEAM


def generate(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    tokens: Int[Array, "B T"],
    which: Int[Array, "B"] | None = None,
    *,
    length: int,
    num_decodes: int = 1,
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """The best output of every row, at most `length` tokens, and its score.

    One beam is greedy decoding (score: log p), more are beam search with T5X's alpha of 0.6.
    """
    encoded = prompts.encode(model, backbone, prompt, tokens, which)
    search = Search(length, num_decodes)
    sequences, scores = generate_all(model, backbone, prompt, encoded, search, which)
    return sequences[:, -1], scores[:, -1]


def generate_all(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    encoded: Encoded,
    search: Search,
    which: Int[Array, "B"] | None = None,
    *,
    keys: Key[Array, "B"] | None = None,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """All beams or samples of every row, the best last, and their scores; samples need `keys`."""
    length, num_decodes, decoding = search
    cache = prompts.init_cache(
        model, backbone, prompt, encoded, which, length=length, num_decodes=num_decodes
    )
    batch = encoded.states.shape[0]

    def step(last: Array, cache: t5.Cache, index: Array) -> tuple[Array, t5.Cache]:
        return t5.apply(model, backbone, "decode_step", last, cache, index)

    if decoding.method == "sample":
        assert keys is not None, "sampling needs a key for each row"
        return temperature_sample(
            step, cache, keys, num_decodes=num_decodes, length=length, decoding=decoding
        )
    if num_decodes == 1:
        tokens, scores = greedy(step, cache, batch, length=length)
        return tokens[:, None], scores[:, None]
    make_rules = beam.t5x_rules if decoding.method == "beam" else beam.transformers_rules
    rules = make_rules(decoding.alpha)
    return beam.beam_search(step, cache, batch, beams=num_decodes, length=length, rules=rules)
