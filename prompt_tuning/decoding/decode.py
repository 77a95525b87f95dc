"""From encoded input to generated tokens: the choice of the method.

`beam.py` and `sample.py` search over a `step` function and know nothing of T5; `generate_all` joins
the two.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from prompt_tuning.config import BEAM, Decoding
from prompt_tuning.decoding import beam
from prompt_tuning.decoding.sample import greedy, row_keys, temperature_sample
from prompt_tuning.model import prompt as prompts
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Encoded, Prompt


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
    numbers: Int[Array, "B"] | None = None,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """All beams or samples of every row, the best last, and their scores.

    The samples of a row depend on its number, one of `numbers`, not on its batch.
    """
    length, num_decodes, decoding = search
    cache = prompts.init_cache(
        model, backbone, prompt, encoded, which, length=length, num_decodes=num_decodes
    )
    batch = encoded.states.shape[0]

    def step(last: Array, cache: t5.Cache, index: Array) -> tuple[Array, t5.Cache]:
        return t5.apply(model, backbone, "decode_step", last, cache, index)

    if decoding.method == "sample":
        assert numbers is not None, "sampling needs the number of each row"
        keys = row_keys(decoding.seed, numbers)
        return temperature_sample(
            step, cache, keys, num_decodes=num_decodes, length=length, decoding=decoding
        )
    if num_decodes == 1:
        tokens, scores = greedy(step, cache, batch, length=length)
        return tokens[:, None], scores[:, None]
    make_rules = beam.t5x_rules if decoding.method == "beam" else beam.transformers_rules
    rules = make_rules(decoding.alpha)
    return beam.beam_search(step, cache, batch, beams=num_decodes, length=length, rules=rules)
