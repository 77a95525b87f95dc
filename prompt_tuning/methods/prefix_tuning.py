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
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config import ModelConfig
from prompt_tuning.config.setting import check
from prompt_tuning.methods.dense import dense, init_dense
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt

PLACES = ("encoder", "decoder", "cross")


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
    """{"prompt/encoder": float[N, 2, P, H, K], ...}, or the MLP of each place."""
    if start.file is not None:
        real = {place: getattr(start.file, place) for place in PLACES}
    else:
        real = {} if start.init == "auto" else activations(start)
    params: Params = {}
    for place in _places(settings):
        key = jax.random.fold_in(start.key, PLACES.index(place))
        shape = (layers(start.model, place), 2, start.length, *_head(start.model))
        if not settings.hidden:
            drawn = jax.random.normal(key, shape, jnp.float32)
            params[f"prompt/{place}"] = drawn if real.get(place) is None else real[place]
            continue
        width, (rows, first, last) = start.model.embed_dim, jax.random.split(key, 3)
        outputs = int(np.prod(shape)) // start.length
        mlp = {
            f"prompt/{place}_rows": jax.random.normal(rows, (start.length, width), jnp.float32),
            **init_dense(first, f"prompt/{place}_in", width, settings.hidden),
            **init_dense(last, f"prompt/{place}_out", settings.hidden, outputs),
        }
        if real.get(place) is not None:
            mlp |= _solve(place, mlp, _rows_first(real[place]))
        params |= mlp
    return params


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The keys and values of each place."""
    fields: dict[str, Float[Array, "N 2 P H K"]] = {}
    for number, place in enumerate(_places(settings)):
        if settings.hidden:
            made = dense(params, f"prompt/{place}_out", _hidden(place, params))
            shape = (len(made), layers(frozen.model, place), 2, *_head(frozen.model))
            prefix = jnp.moveaxis(made.reshape(shape), 0, 2)
        else:
            prefix = params[f"prompt/{place}"]
        if settings.dropout and key is not None:
            stays = jax.random.bernoulli(
                jax.random.fold_in(key, number), 1 - settings.dropout, prefix.shape
            )
            prefix = jnp.where(stays, prefix / (1 - settings.dropout), 0.0)
        fields[place] = prefix
    return Prompt(jnp.zeros((0, frozen.model.embed_dim), jnp.float32), **fields)


def layers(model: ModelConfig, place: str) -> int:
    """How many layers have an attention of this place."""
    return model.num_encoder_layers if place == "encoder" else model.num_decoder_layers


def activations(start: Start) -> Mapping[str, Float[Array, "N 2 P H K"]]:
    """The keys and values that the frozen T5 computes of the first rows, as input and as targets.

    The rows see each other in the encoder; as targets they see those before them, and the encoded.
    """
    model = t5.T5(dataclasses.replace(start.model, dtype="float32"))
    rows = jnp.asarray(start.draw_rows(start.length), jnp.float32)[None]
    valid = jnp.ones(rows.shape[:2], bool)
    states, encoder = t5.encode_keys_values(model, start.backbone, rows, valid)
    decoder = t5.decode_keys_values(model, start.backbone, rows, states, valid)
    cross = t5.apply(model, start.backbone, "cross_keys_values", states)
    return {"encoder": encoder[0], "decoder": decoder[0], "cross": cross[0]}


def _places(settings: Settings) -> list[str]:
    return [place for place in PLACES if getattr(settings, place)]


def _head(model: ModelConfig) -> tuple[int, int]:
    return model.num_heads, model.head_dim


def _hidden(place: str, params: Params) -> Float[Array, "P m"]:
    return jnp.tanh(dense(params, f"prompt/{place}_in", params[f"prompt/{place}_rows"]))


def _rows_first(prefix: Float[Array, "N 2 P H K"]) -> Float[np.ndarray, "P o"]:
    return np.moveaxis(np.asarray(prefix, np.float64), 2, 0).reshape(prefix.shape[2], -1)


def _solve(place: str, mlp: Params, wanted: Float[np.ndarray, "P o"]) -> Params:
    """The last layer that gives `wanted`, with the smallest weights."""
    hidden = np.asarray(_hidden(place, mlp), np.float64)
    bias = wanted.mean(axis=0)
    kernel = np.linalg.lstsq(hidden, wanted - bias, rcond=None)[0]
    return {
        f"prompt/{place}_out_kernel": jnp.asarray(kernel, jnp.float32),
        f"prompt/{place}_out_bias": jnp.asarray(bias, jnp.float32),
    }


METHOD = Method(Settings, init, fold, starts=STARTS, fields=PLACES)
