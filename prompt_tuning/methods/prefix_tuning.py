"""Prefix-tuning (Li and Liang 2021, arXiv 2101.00190): keys and values in front of every layer's.

    prompt.encoder, prompt.decoder, prompt.cross: float[N, 2, P, H, K] of each place

The three places have parameters of their own, as in the authors' code for BART: the encoder's
self-attention, the decoder's, and cross-attention. With `hidden`, each is computed from P rows by
an MLP, W2 tanh(W1 E + b1) + b2, which is not needed after training: what is saved is its result.

It begins with normal draws (PyTorch's, in the code of P-tuning v2), or, with a PROMPT_INIT, as the
keys and values that the frozen T5 computes of those rows: a text's, for instance, as t-few does
(Liu et al. 2022, arXiv 2205.05638), which trains its MLP to give them. Here the MLP's last matrix
is the least-squares solution, exact where `hidden` is P or more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.dense import dense, init_dense
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start, shapes_of_fields
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import PREFIXES, Prompt, no_prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which attentions have a prefix, and the width of the MLP behind it; 0 is none."""

    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    hidden: int = 0
    dropout: float = 0.0  # of the keys and values

    def __post_init__(self) -> None:
        check(
            self.encoder or self.decoder or self.cross,
            "PROMPT_SETTINGS leaves no prefix. Expected True for one or more of 'encoder', "
            "'decoder' and 'cross'.",
        )
        check(
            self.hidden >= 0,
            f"PROMPT_SETTINGS = {{'hidden': {self.hidden}}}: expected the MLP's width, or 0 for no "
            "MLP.",
        )
        check(
            0 <= self.dropout < 1,
            f"PROMPT_SETTINGS = {{'dropout': {self.dropout}}}: expected a rate from 0 to below 1.",
        )


def init(settings: Settings, start: Start) -> Params:
    """{"prompt/encoder": float[N, 2, P, H, K], ...}, or the rows and the MLP of each place."""
    real: Mapping[str, Any] = {}
    if start.file is not None:
        real = start.file._asdict()
    elif start.init != "auto":
        real = activations(start)
    params: Params = {}
    for place in _places(settings):
        shape = shapes_of_fields(start.model, start.length)[place]
        key, prefix = jax.random.fold_in(start.key, PREFIXES.index(place)), real.get(place)
        if settings.hidden:
            params |= _init_mlp(key, place, settings.hidden, shape, start.model.embed_dim, prefix)
        else:
            drawn = jax.random.normal(key, shape, jnp.float32)
            params[f"prompt/{place}"] = drawn if prefix is None else jnp.asarray(prefix)
    return params


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The keys and values of each place."""
    fields: dict[str, Float[Array, "N 2 P H K"]] = {}
    for number, place in enumerate(_places(settings)):
        if settings.hidden:
            made = dense(params, f"prompt/{place}_out", _hidden(place, params))
            n, two, length, *head = shapes_of_fields(frozen.model, len(made))[place]
            prefix = jnp.moveaxis(made.reshape(length, n, two, *head), 0, 2)
        else:
            prefix = params[f"prompt/{place}"]
        if settings.dropout and key is not None:
            key_of_place, rate = jax.random.fold_in(key, number), settings.dropout
            stays = jax.random.bernoulli(key_of_place, 1 - rate, prefix.shape)
            prefix = jnp.where(stays, prefix / (1 - rate), 0.0)
        fields[place] = prefix
    return no_prompt(frozen.model)._replace(**fields)


def activations(start: Start) -> Mapping[str, Float[Array, "N 2 P H K"]]:
    """The keys and values that the frozen T5 computes of the first rows, as input and as targets.

    The rows see each other in the encoder; as targets they see those before them, and the encoded.
    """
    model = t5.T5(dataclasses.replace(start.model, dtype="float32", attention="xla"))
    rows = jnp.asarray(start.draw_rows(start.length), jnp.float32)[None]
    valid = jnp.ones(rows.shape[:2], bool)
    states, encoder = t5.encode_keys_values(model, start.backbone, rows, valid)
    decoder = t5.decode_keys_values(model, start.backbone, rows, states, valid)
    cross = t5.apply(model, start.backbone, "cross_keys_values", states)
    return {"encoder": encoder[0], "decoder": decoder[0], "cross": cross[0]}


def _places(settings: Settings) -> list[str]:
    return [place for place in PREFIXES if getattr(settings, place)]


def _init_mlp(
    key: PRNGKeyArray,
    place: str,
    hidden: int,
    shape: tuple[int, ...],
    width: int,
    prefix: Float[ArrayLike, "N 2 P H K"] | None,
) -> Params:
    """Rows and the two layers of an MLP; its last one is solved to give `prefix`, if there is one.

    Of all that do, it has the smallest weights.
    """
    layers, two, length, *head = shape
    rows, first, last = jax.random.split(key, 3)
    mlp = {
        f"prompt/{place}_rows": jax.random.normal(rows, (length, width), jnp.float32),
        **init_dense(first, f"prompt/{place}_in", width, hidden),
        **init_dense(last, f"prompt/{place}_out", hidden, layers * two * math.prod(head)),
    }
    if prefix is not None:
        wanted = np.moveaxis(np.asarray(prefix, np.float64), 2, 0).reshape(length, -1)
        bias, values = wanted.mean(axis=0), np.asarray(_hidden(place, mlp), np.float64)
        kernel = np.linalg.lstsq(values, wanted - bias, rcond=None)[0]
        mlp[f"prompt/{place}_out_kernel"] = jnp.asarray(kernel, jnp.float32)
        mlp[f"prompt/{place}_out_bias"] = jnp.asarray(bias, jnp.float32)
    return mlp


def _hidden(place: str, params: Params) -> Float[Array, "P m"]:
    return jnp.tanh(dense(params, f"prompt/{place}_in", params[f"prompt/{place}_rows"]))


METHOD = Method(Settings, init, fold, starts=STARTS, fields=PREFIXES)
