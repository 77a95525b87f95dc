"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a small network makes the rows of an embedding.

    encoder 'mlp'    prompt = W3 ReLU(W2 ReLU(W1 E))
    encoder 'lstm'   prompt = W2 ReLU(W1 LSTM(E))

E is float[P, D]; every W has a bias; h is `hidden`. The shapes are Hugging Face PEFT's: 'mlp' goes
D, h, h, D; the LSTM has two layers in both directions of h each, and its MLP goes 2h, 2h, D. With
h = D/2 that is the LSTM of the authors' LAMA code; their few-shot code has h = D (and trains the
backbone as well). The backbone is frozen here. `dropout` is between the LSTM's layers.
E begins as N(0, 1) and the network as PyTorch begins it; with a PROMPT_INIT other than 'auto', E
begins as those rows (the prompt is what the untrained network makes of them).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.dense import dense, init_dense
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The network, its width and its dropout."""

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = 128  # as in PEFT's guide
    dropout: float = 0.0  # of the LSTM, in training

    def __post_init__(self) -> None:
        check(
            self.hidden >= 1,
            f"PROMPT_SETTINGS = {{'hidden': {self.hidden}}}: the network has no width. Expected 1 "
            "or more.",
        )
        check(
            self.dropout == 0 or (self.encoder == "lstm" and 0 < self.dropout < 1),
            f"PROMPT_SETTINGS = {{'dropout': {self.dropout}}}: impossible for encoder = "
            f"{self.encoder!r}. Expected 0.0 for 'mlp', 0.0 or more and below 1.0 for 'lstm'.",
        )


def init(settings: Settings, start: Start) -> Params:
    """The embedding and the network."""
    keys = iter(jax.random.split(start.key, 12))
    width, hidden = start.model.embed_dim, settings.hidden
    rows = jax.random.normal(next(keys), (start.length, width), jnp.float32)
    params = {"prompt/embedding": rows if start.init == "auto" else start.draw_rows(start.length)}
    sizes = [width, hidden, hidden, width]
    if settings.encoder == "lstm":
        sizes = [2 * hidden, 2 * hidden, width]
        for layer, inputs in enumerate((width, 2 * hidden)):
            for direction in DIRECTIONS:
                name = f"prompt/lstm_{layer}_{direction}"
                bound = hidden**-0.5
                params |= init_dense(next(keys), f"{name}_input", inputs, 4 * hidden, bound)
                params |= init_dense(next(keys), f"{name}_state", hidden, 4 * hidden, bound)
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        params |= init_dense(next(keys), f"prompt/mlp_{layer}", inputs, outputs)
    return params


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """What the network makes of the embedding."""
    x = params["prompt/embedding"]
    layers = 3
    if settings.encoder == "lstm":
        layers = 2
        x = _both_ways(params, "prompt/lstm_0", x)
        if key is not None and settings.dropout:
            keep = jax.random.bernoulli(key, 1 - settings.dropout, x.shape)
            x = jnp.where(keep, x / (1 - settings.dropout), 0)
        x = _both_ways(params, "prompt/lstm_1", x)
    for layer in range(layers):
        x = dense(params, f"prompt/mlp_{layer}", jax.nn.relu(x) if layer else x)
    return Prompt(rows=x)


def _both_ways(params: Params, name: str, x: Float[Array, "P I"]) -> Float[Array, "P 2*h"]:
    """A bidirectional LSTM's output for the rows in order, forward and backward side by side."""
    return jnp.concatenate([_lstm(params, f"{name}_{d}", x, d) for d in DIRECTIONS], axis=-1)


def _lstm(params: Params, name: str, x: Float[Array, "P I"], direction: str) -> Array:
    """C = sigmoid(f) c + sigmoid(i) tanh(g) and y = sigmoid(o) tanh(c), row after row from zero."""

    def step(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        y, c = state
        i, f, g, o = jnp.split(gates + dense(params, f"{name}_state", y), 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        y = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (y, c), y

    zeros = jnp.zeros(params[f"{name}_state_kernel"].shape[0], x.dtype)
    gates = dense(params, f"{name}_input", x)
    return jax.lax.scan(step, (zeros, zeros), gates, reverse=direction == "backward")[1]


METHOD = Method(Settings, init, fold, starts=STARTS)
