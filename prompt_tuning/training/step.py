"""One training step: the gradient of the trainable part, and nothing else.

The frozen part is a plain argument. No gradient, optimiser slot or output of its size exists, which
the tests hold the compiled step to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from prompt_tuning.config import ModelConfig, TrainConfig
from prompt_tuning.model.loss import METRICS, Metrics, forward, loss_fn
from prompt_tuning.model.products import fit_to

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


def make_gradient(
    config: ModelConfig, train: TrainConfig
) -> Callable[[TrainState, Flat, Flat, Array | None], tuple[Flat, Metrics]]:
    """The function (state, frozen, batch, group) -> (gradient of the trainable part, metrics).

    Dropout draws from (random_seed, step), and from the number of the length group where there is
    one, so that a resumed run repeats it. Groups drop out other units than the whole batch would:
    the same distribution, other draws.
    """

    def gradient(
        state: TrainState, frozen: Flat, batch: Flat, group: Array | None
    ) -> tuple[Flat, Metrics]:
        key = None
        if config.dropout_rate > 0.0:
            key = jax.random.fold_in(jax.random.key(train.random_seed), state.step)
            key = key if group is None else jax.random.fold_in(key, group)

        def loss(trainable: Flat) -> tuple[Array, Metrics]:
            logits = forward_split(config, trainable, frozen, batch, key)
            return loss_fn(
                logits, batch, z_loss=train.z_loss, label_smoothing=train.label_smoothing
            )

        return jax.grad(loss, has_aux=True)(state.trainable)

    return gradient


def update(
    optimizer: optax.GradientTransformation, state: TrainState, total: tuple[Flat, Metrics]
) -> tuple[TrainState, Metrics]:
    """The state after a step whose gradient and metrics are `total`."""
    grads, metrics = total
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    # Of the trainable part only: the norm of all gradients would bring the frozen ones back.
    metrics = metrics | {"gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, cast(dict[str, Array], trainable), opt_state), metrics


def make_train_step(
    config: ModelConfig, train: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Flat, Flat], tuple[TrainState, Metrics]]:
    """The function (state, frozen, batch) -> (state, metrics), to be jitted with state donated."""
    gradient = make_gradient(config, train)

    def train_step(state: TrainState, frozen: Flat, batch: Flat) -> tuple[TrainState, Metrics]:
        return update(optimizer, state, gradient(state, frozen, batch, None))

    return train_step


class Programs(NamedTuple):
    """The compiled parts of a step: `run_step` puts them together."""

    whole: Callable[..., Any]  # (state, frozen, batch) -> (state, metrics); state is donated
    zeros: Callable[..., Any]  # (state) -> total
    add: Callable[..., Any]  # (total, state, frozen, batch, group) -> total; total is donated
    update: Callable[..., Any]  # (state, total) -> (state, metrics); state is donated


def compile_step(
    config: ModelConfig,
    train: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState | None = None,
    *,
    platform: str = "",
) -> Programs:
    """The programs of a step, each compiled once for every shape of a batch or group.

    With a `state` that lies on a mesh, what comes back lies where it lay; without one XLA chooses.
    `platform` is named where the devices of the state only stand for those of another platform.
    """
    if state is not None:
        config = fit_to(config, state.step.sharding.device_set, platform)
    gradient = make_gradient(config, train)

    def zeros(state: TrainState) -> tuple[Flat, Metrics]:
        sums = {name: jnp.float32(0.0) for name in METRICS}
        return jax.tree.map(jnp.zeros_like, state.trainable), sums

    def add(
        total: tuple[Flat, Metrics], state: TrainState, frozen: Flat, batch: Flat, group: Array
    ) -> tuple[Flat, Metrics]:
        return jax.tree.map(jnp.add, total, gradient(state, frozen, batch, group))

    where = _where(state)
    # To find a NaN JAX repeats the step that made it, and needs the state of before.
    debugs: bool = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
    donated = () if debugs else 0
    return Programs(
        whole=jax.jit(
            make_train_step(config, train, optimizer),
            donate_argnums=donated,
            out_shardings=where.state,
        ),
        zeros=jax.jit(zeros, out_shardings=where.total),
        add=jax.jit(add, donate_argnums=donated, out_shardings=where.total),
        update=jax.jit(
            functools.partial(update, optimizer), donate_argnums=donated, out_shardings=where.state
        ),
    )


class _Where(NamedTuple):
    """Shardings of what the programs return; None leaves them to XLA."""

    state: Any = None
    total: Any = None


def _where(state: TrainState | None) -> _Where:
    if state is None:
        return _Where()
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = kept.step  # a scalar's, like those of the metrics
    return _Where((kept, everywhere), (kept.trainable, everywhere))


def run_step(
    programs: Programs, state: TrainState, frozen: Flat, groups: Sequence[Flat]
) -> tuple[TrainState, Metrics]:
    """One step on a batch that was cut into length groups; the gradient is that of the whole batch.

    `state` must not be used afterwards: its memory is the new one's.
    """
    if len(groups) == 1:
        return programs.whole(state, frozen, groups[0])
    total = programs.zeros(state)
    for number, group in enumerate(groups):
        total = programs.add(total, state, frozen, group, np.int32(number))
    return programs.update(state, total)
