"""The prompt: what it holds, and a T5 that encodes and decodes with it.

The backbone (`t5.py`) does not know `Prompt`: it takes embeddings, validity, and keys and values to
put in front. `encode`, `decode` and `init_cache` here take a prompt apart; `loss.py`, decoding,
ranking and serving call them and never see a prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from prompt_tuning.config import ModelConfig
from prompt_tuning.model import t5
from prompt_tuning.model.attention import Prefix, TargetValid, Valid
from prompt_tuning.model.device import padded_length


class Prompt(NamedTuple):
    """What a frozen T5 is given beside its input.

    `*M` is nothing, or one axis of members: the tasks of a multi-task prompt, or prompts that are
    served together. `which`, int32[B], then names the member of each row of a batch. Rows are
    padded on the right, and the text follows a row's own prompt at once; prefixes are padded on the
    left: their last keys are at position -1. J, their length, may differ from field to field.
    """

    rows: Float[Array, "*M P D"]  # in front of the embedded encoder input
    encoder: Float[Array, "*M N 2 J H K"] | None = None  # keys and values before each layer's own
    decoder: Float[Array, "*M N 2 J H K"] | None = None  # the same for the decoder's self-attention
    cross: Float[Array, "*M N 2 J H K"] | None = None  # the same for cross-attention
    memory: Float[Array, "*M J D"] | None = None  # rows in front of the encoder's output
    lengths: Int[Array, "*M 5"] | None = None  # of each field; None: members are all full


# Which axis of each field counts its positions, in the order of `lengths`.
POSITIONS = {"rows": -2, "encoder": -3, "decoder": -3, "cross": -3, "memory": -2}
PREFIXES = ("encoder", "decoder", "cross")  # the fields of keys and values


class Encoded(NamedTuple):
    """The encoder's output, and which of its positions the decoder may see."""

    states: Float[Array, "R S D"]
    valid: Valid


def no_prompt(config: ModelConfig) -> Prompt:
    """A prompt without rows: the model as it is."""
    rows: Any = np.zeros((0, config.embed_dim), np.float32)  # on no device yet
    return Prompt(rows)


def stack_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """One prompt whose members are `prompts`: their rows padded on the right, and their lengths.

    >>> prompt = stack_prompts([Prompt(jnp.ones((3, 4))), Prompt(jnp.ones((1, 4)))])
    >>> prompt.rows.shape, prompt.lengths[:, 0].tolist()
    ((2, 3, 4), [3, 1])
    """
    fields: dict[str, Any] = {}
    lengths = np.zeros((len(prompts), len(POSITIONS)), np.int32)
    for column, (field, axis) in enumerate(POSITIONS.items()):
        given = [x for prompt in prompts if (x := getattr(prompt, field)) is not None]
        if not given:
            continue
        none = np.take(given[0], [], axis)
        members = [none if (x := getattr(p, field)) is None else x for p in prompts]
        lengths[:, column] = [x.shape[axis] for x in members]
        fields[field] = jnp.stack([_pad(field, x, int(lengths[:, column].max())) for x in members])
    return Prompt(**fields, lengths=jnp.asarray(lengths))


def take_member(prompt: Prompt, number: int) -> Prompt:
    """One of the members, which are all full, as a prompt of its own.

    >>> take_member(Prompt(jnp.ones((2, 3, 4))), 1).rows.shape
    (3, 4)
    """
    return jax.tree.map(lambda field: field[number], prompt)


def _pad(field: str, x: Any, length: int) -> Float[Array, "..."]:
    """A member's field, float32, with as many positions as the longest has."""
    more, ends = length - x.shape[POSITIONS[field]], [(0, 0)] * x.ndim
    ends[POSITIONS[field]] = (0, more) if field == "rows" else (more, 0)
    return jnp.pad(jnp.asarray(x, jnp.float32), ends)


def other_fields(prompt: Prompt) -> list[str]:
    """The names of what a prompt has beside its rows."""
    return [name for name in Prompt._fields[1:] if getattr(prompt, name) is not None]


def read_memory(model: t5.T5, backbone: t5.Params, prompt: Prompt) -> Prompt:
    """The prompt with its memory as keys and values of `cross`: computed once, for all who use it.

    It has no members.
    """
    front = _cross_prefix(model, backbone, prompt, None)
    return prompt if front is None else prompt._replace(cross=front.keys_values[0], memory=None)


def prepend_prompt(
    prompt: Float[Array, "*B P D"], x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B P+T D"], Bool[Array, "B P+T"]]:
    """Puts the prompt, the same or each row's own, in front of every row and marks it valid.

    The prompt has no token ids, so padding cannot be read from the tokens any more: this is where
    the longer mask is made, and everything after it takes `valid` as given.

    >>> x, valid = prepend_prompt(jnp.ones((2, 4)), jnp.zeros((3, 5, 4)), jnp.ones((3, 5), bool))
    >>> x.shape, valid.shape
    ((3, 7, 4), (3, 7))
    """
    batch = x.shape[0]
    rows = jnp.broadcast_to(prompt.astype(x.dtype), (batch, *prompt.shape[-2:]))
    seen = jnp.ones((batch, prompt.shape[-2]), bool)
    return jnp.concatenate([rows, x], axis=1), jnp.concatenate([seen, valid], axis=1)


def member_lengths(prompt: Prompt, which: Int[Array, "B"], field: str = "rows") -> Int[Array, "B"]:
    """How many positions of a field stand in front of each row of a batch."""
    if prompt.lengths is None:
        return jnp.full(which.shape, getattr(prompt, field).shape[POSITIONS[field]], jnp.int32)
    return prompt.lengths[which, [*POSITIONS].index(field)]


def _prefix(
    prompt: Prompt, field: str, which: Int[Array, "B"] | None, keys_values: Array | None = None
) -> Prefix | None:
    """What a stack reads of a field, or of its `keys_values`: for each row, or the same for all."""
    array = getattr(prompt, field) if keys_values is None else keys_values
    if array is None:
        return None
    array, places = jnp.asarray(array), jnp.arange(array.shape[-3])
    if which is None:
        return Prefix(array[None], jnp.ones((1, len(places)), bool))
    padding = len(places) - member_lengths(prompt, which, field)
    return Prefix(array[which], places >= padding[:, None])


def _cross_prefix(
    model: t5.T5, backbone: t5.Params, prompt: Prompt, which: Int[Array, "B"] | None
) -> Prefix | None:
    """What cross-attention reads in front of the encoder's output, the prompt's memory too.

    Keys and values of the memory are computed once for each member, not for each row.
    """
    of_cross = _prefix(prompt, "cross", which)
    if prompt.memory is None:
        return of_cross
    memory = jnp.asarray(prompt.memory, jnp.dtype(model.config.dtype))
    members = memory if memory.ndim == 3 else memory[None]
    read = t5.apply(model, backbone, "cross_keys_values", members)
    read = read if memory.ndim == 3 else read[0]
    of_memory = cast(Prefix, _prefix(prompt, "memory", which, read))
    if of_cross is None:
        return of_memory
    arrays = of_memory.keys_values, of_cross.keys_values.astype(read.dtype)
    valid = jnp.concatenate([of_memory.valid, of_cross.valid], axis=1)
    return Prefix(jnp.concatenate(arrays, axis=3), valid)


def shift_tokens(
    tokens: Int[Array, "B T"], by: Int[Array, "B"], width: int
) -> Int[Array, "B {width}"]:
    """The tokens of each row moved `by` places to the right, 0 elsewhere.

    >>> shift_tokens(jnp.array([[5, 6], [7, 0]]), jnp.array([1, 2]), 4).tolist()
    [[0, 5, 6, 0], [0, 0, 7, 0]]
    """
    place = jnp.arange(width)[None, :] - by[:, None]
    is_text = (place >= 0) & (place < tokens.shape[1])
    shifted = jnp.take_along_axis(tokens, jnp.clip(place, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where(is_text, shifted, 0)


def encode(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    tokens: Int[Array, "B T"],
    which: Int[Array, "B"] | None = None,
    *,
    width: int | None = None,
    segments: Int[Array, "B T"] | None = None,
    noise: Float[Array, "B T D"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> Encoded:
    """The encoder's output for prompt and tokens, and which of its positions are valid.

    The prompt is prepended before dropout, every position sees it, and it counts in the relative
    positions (paper 2). Token 0 is padding. If the prompt has members, `which` names that of each
    row, and the text follows the rows of its own prompt at once: padding between them would shift
    relative positions. S is then `width`, at least the longest row (P + T by default). With a
    `dropout_key` the encoder drops out. `noise` is added to the embedded tokens, and takes members
    of one length. The `segments` of packed rows are for a model without a prompt: one prompt cannot
    precede several examples.
    """
    are_full = prompt.lengths is None and width is None
    assert noise is None or segments is None, "noise is for rows of one example"
    if segments is not None:
        assert prompt.rows.shape[-2] == 0, "packed rows take no prompt"
        x, valid = t5.apply(model, backbone, "embed", tokens), segments
    elif which is None or are_full:
        x = t5.apply(model, backbone, "embed", tokens)
        x = x if noise is None else x + noise.astype(x.dtype)
        rows = jnp.asarray(prompt.rows)
        x, valid = prepend_prompt(rows if which is None else rows[which], x, tokens > 0)
    else:
        assert noise is None, "noise is for members of one length"
        places = width or prompt.rows.shape[-2] + tokens.shape[1]
        lengths = member_lengths(prompt, which)
        tokens = shift_tokens(tokens, lengths, places)
        is_prompt = jnp.arange(places)[None, :] < lengths[:, None]
        own = jnp.take(prompt.rows, which, axis=0)[:, :places]
        own = jnp.pad(own, ((0, 0), (0, places - own.shape[1]), (0, 0)))
        x = t5.apply(model, backbone, "embed", tokens)
        x, valid = jnp.where(is_prompt[..., None], own.astype(x.dtype), x), is_prompt | (tokens > 0)
    x, valid = pad_sequence(model, x, valid)
    train = dropout_key is not None
    states = t5.apply(
        model,
        backbone,
        "encode",
        x,
        valid,
        prefix=_prefix(prompt, "encoder", which),
        train=train,
        dropout_key=dropout_key,
    )
    return Encoded(states, valid)


def pad_sequence(
    model: t5.T5, x: Float[Array, "B N D"], valid: Shaped[Array, "B N"]
) -> tuple[Float[Array, "B S D"], Valid]:
    """Adds positions that are not valid, as many as the model's device needs."""
    more = padded_length(model.config, model.device, x.shape[1]) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(valid, ((0, 0), (0, more)))


def decode(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    tokens: Int[Array, "B L"],
    encoded: Encoded,
    which: Int[Array, "R"] | None = None,
    *,
    target_valid: TargetValid | None = None,
    rows: Int[Array, "G C"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B L V"]:
    """Logits of every target, given decoder inputs (the targets shifted right).

    `which` names the member of each encoded row; `rows` is as for `T5.decode`.
    """
    return t5.apply(
        model,
        backbone,
        "decode",
        tokens,
        *encoded,
        prefix=_prefix(prompt, "decoder", which),
        cross=_cross_prefix(model, backbone, prompt, which),
        target_valid=target_valid,
        rows=rows,
        train=dropout_key is not None,
        dropout_key=dropout_key,
    )


def init_cache(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    encoded: Encoded,
    which: Int[Array, "R"] | None = None,
    *,
    length: int,
    num_decodes: int = 1,
) -> t5.Cache:
    """The state of incremental decoding before the first of `length` tokens; see `T5.init_cache`.

    What the decoder is given by the prompt is put into it, so that `T5.decode_step` needs no more.
    """
    return t5.apply(
        model,
        backbone,
        "init_cache",
        *encoded,
        length,
        num_decodes,
        prefix=_prefix(prompt, "decoder", which),
        cross=_cross_prefix(model, backbone, prompt, which),
    )
