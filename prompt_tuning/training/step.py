"""One training step: the gradient of the trainable part, and nothing else.

The frozen part is a plain argument. No gradient, optimiser slot or output of its size exists, which
the tests hold the compiled step to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from prompt_tuning.config import ModelConfig, TrainConfig
from prompt_tuning.model.loss import Metrics, forward, loss_fn

Flat = Mapping[str, Array]


class TrainState(NamedTuple):
    """All that a step changes, and all that a run saves."""

    step: Int[Array, ""]  # absolute: counts the backbone's own steps
    trainable: dict[str, Array]
    opt_state: Any


def init_state(
    trainable: Mapping[str, Array], optimizer: optax.GradientTransformation, step: int
) -> TrainState:
    """The state before the first step; trainable parameters are float32."""
    params = {name: jnp.asarray(value, jnp.float32) for name, value in trainable.items()}
    return TrainState(jnp.int32(step), params, optimizer.init(params))


def forward_split(
    config: ModelConfig, trainable: Flat, frozen: Flat, batch: Flat, key: Array | None = None
) -> Array:
    """`forward` for parameters that were split by the mask; the prompt is the one named so."""
    params = {**frozen, **trainable}
    prompt = params.pop("prompt")
    return forward(config, params, prompt, batch, dropout_key=key)


def make_train_step(
    config: ModelConfig, train: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Flat, Flat], tuple[TrainState, Metrics]]:
    """The function (state, frozen, batch) -> (state, metrics), to be jitted with state donated.

    Dropout draws from (random_seed, step) alone, so that a resumed run repeats it.
    """

    def train_step(state: TrainState, frozen: Flat, batch: Flat) -> tuple[TrainState, Metrics]:
        key = None
        if config.dropout_rate > 0.0:
            key = jax.random.fold_in(jax.random.key(train.random_seed), state.step)

        def loss(trainable: Flat) -> tuple[Array, Metrics]:
            logits = forward_split(config, trainable, frozen, batch, key)
            return loss_fn(
                logits, batch, z_loss=train.z_loss, label_smoothing=train.label_smoothing
            )

        grads, metrics = jax.grad(loss, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # Of the trainable part only: the norm of all gradients would bring the frozen ones back.
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, cast(dict[str, Array], trainable), opt_state), metrics

    return train_step
