"""The prompt: how `float[P, D]` goes in front of the embedded input.

Between `T5.embed` and `T5.encode`. The backbone (`t5.py`) does not know it; `loss.py` and
`decode.py` call `encode_prompted` and never see a prompt length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from prompt_tuning.config import ModelConfig
from prompt_tuning.model import t5
from prompt_tuning.model.attention import Valid
from prompt_tuning.model.products import positions


class Prompt(NamedTuple):
    """What a frozen T5 is given beside its input.

    `*M` is nothing, or one axis of members: the tasks of a multi-task prompt, or prompts that are
    served together. `which`, int32[B], then names the member of each row of a batch. Rows are
    padded on the right, and the text follows a row's own prompt at once; prefixes are padded on the
    left. J, the length of a prefix, may differ from field to field.
    """

    rows: Float[Array, "*M P D"]  # in front of the embedded encoder input
    encoder: Float[Array, "*M N 2 J H K"] | None = None  # keys and values before each layer's own
    decoder: Float[Array, "*M N 2 J H K"] | None = None  # the same for the decoder's self-attention
    cross: Float[Array, "*M N 2 J H K"] | None = None  # the same for cross-attention
    memory: Float[Array, "*M J D"] | None = None  # rows in front of the encoder's output
    lengths: Int[Array, "*M 5"] | None = None  # of each field; None: members are all full


def prepend_prompt(
    prompt: Float[Array, "P D"], x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B P+T D"], Bool[Array, "B P+T"]]:
    """Puts the prompt in front of every row and marks it valid.

    The prompt has no token ids, so padding cannot be read from the tokens any more: this is the
    one place where the longer mask is made, and everything after it takes `valid` as given.

    >>> x, valid = prepend_prompt(jnp.ones((2, 4)), jnp.zeros((3, 5, 4)), jnp.ones((3, 5), bool))
    >>> x.shape, valid.shape
    ((3, 7, 4), (3, 7))
    """
    batch = x.shape[0]
    rows = jnp.broadcast_to(prompt.astype(x.dtype), (batch, *prompt.shape))
    seen = jnp.ones((batch, prompt.shape[0]), bool)
    return jnp.concatenate([rows, x], axis=1), jnp.concatenate([seen, valid], axis=1)


def encode_prompted(
    config: ModelConfig,
    backbone: t5.Params,
    prompt: Float[Array, "P D"],
    tokens: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B S D"], Valid]:
    """The encoder's output for prompt and tokens, and which of its positions are valid.

    The prompt stands before dropout, is seen by every position, and counts in the relative
    positions (paper 2). Token 0 is padding. With a `dropout_key` the encoder drops out. The
    `segments` of packed rows are for a model without a prompt: one prompt could not stand in front
    of several examples.
    """
    x = t5.apply(config, backbone, "embed", tokens)
    if segments is None:
        x, valid = prepend_prompt(prompt, x, tokens > 0)
    else:
        assert prompt.shape[0] == 0, "packed rows take no prompt"
        valid = segments
    x, valid = fill_up(config, x, valid)
    train = dropout_key is not None
    encoded = t5.apply(config, backbone, "encode", x, valid, train=train, dropout_key=dropout_key)
    return encoded, valid


def fill_up(
    config: ModelConfig, x: Float[Array, "B N D"], valid: Shaped[Array, "B N"]
) -> tuple[Float[Array, "B S D"], Valid]:
    """Adds positions that are not valid, as many as the devices of the model need (`positions`)."""
    more = positions(config, x.shape[1]) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(valid, ((0, 0), (0, more)))
