"""A shared prompt: rows that do not see the input, so that they are encoded once for all of it.

    prompt.encoder, prompt.memory = the frozen encoder's keys, values and outputs of P

P is float[P, D], the only parameter, as in prompt tuning. There the rows of the prompt attend to
the text behind them and are encoded with every row of a batch. Here they attend only to each
other, so they are encoded once a step, and once in all after training. Their keys and values stand
in front of those of each row, and their outputs in front of the encoded row, for the decoder. The
text sees the prompt as it does in prompt tuning, at the same distances.

The result is that of a plain prompt under a mask that hides the text from it. Dropout is drawn for
the prompt once a step, where a plain prompt has a draw for each row. It is computed in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from prompt_tuning.methods import prompt_tuning
from prompt_tuning.methods.method import Frozen, Params
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt, no_prompt


def fold(
    settings: prompt_tuning.Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None
) -> Prompt:
    """What the frozen encoder makes of the rows; with a key it drops out."""
    model = t5.T5(dataclasses.replace(frozen.model, dtype="float32", attention="xla"))
    rows = jnp.asarray(params["prompt"])[None]
    states, keys_values = t5.encode_keys_values(
        model, frozen.params, rows, jnp.ones(rows.shape[:2], bool), dropout_key=key
    )
    return no_prompt(frozen.model)._replace(encoder=keys_values[0], memory=states[0])


METHOD = prompt_tuning.METHOD._replace(fold=fold, fields=("encoder", "memory"), visibility="prompt")


def fold_rows(rows: Float[ArrayLike, "P D"], frozen: Frozen) -> Prompt:
    """The prompt of saved rows: the one that was evaluated."""

    @jax.jit
    def compiled(rows: Array, params: Mapping[str, Array]) -> Prompt:
        settings = prompt_tuning.Settings()
        return fold(settings, {"prompt": rows}, Frozen(frozen.model, params), None)

    return compiled(jnp.asarray(rows), dict(frozen.params))
