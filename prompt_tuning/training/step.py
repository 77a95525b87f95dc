"""One training step: the gradient of the trainable parameters alone, and their update.

    fold      parameters of the method -> Prompt            once a step
    add       gradient of one length group with respect to the folded prompt, added to a sum
    update    the sum, pulled back through fold once -> optax -> the next state

The frozen backbone is a plain argument. The compiled step has no gradient, optimiser slot or output
of its size; a test checks that. In model tuning the backbone is trained, and a sum is a pair: the
gradients of the prompt and of the backbone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prompt_tuning.config import OptimizerConfig, PromptConfig, TrainConfig
from prompt_tuning.methods.method import Frozen, Method
from prompt_tuning.methods.table import find_method, make_settings
from prompt_tuning.model.loss import (
    METRICS,
    Metrics,
    divergence,
    draw_noise,
    forward,
    loss_fn,
)
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.model.t5 import T5
from prompt_tuning.training import optim

Flat = Mapping[str, Array]
# Folded into a key for something else than dropout; greater than any group's number.
FOLD = 2**31 - 1
NOISE = 2**31 - 2


class TrainState(NamedTuple):
    """The arrays that a step changes and a run saves."""

    step: Int[Array, ""]  # absolute: counts the backbone's own steps
    trainable: dict[str, Array]  # also the method's `fixed` parameters, which no step changes
    opt_state: Any
    average: dict[str, Array]  # PROMPT_AVERAGE's, of the parameters that the method trains; or {}


class Total(NamedTuple):
    """Gradients and metrics, summed over the length groups of a batch."""

    prompt: Prompt  # gradient with respect to the folded prompt
    backbone: dict[str, Array]  # of the backbone's trained parameters; {} in prompt tuning
    metrics: Metrics


class Recipe(NamedTuple):
    """The static parts of a step, fixed when it is compiled."""

    model: T5
    train: TrainConfig
    method: Method
    settings: Any  # the method's
    optimizer: optax.GradientTransformation
    start_step: int = 0  # of the backbone


def make_recipe(
    model: T5,
    prompt: PromptConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    *,
    start_step: int = 0,
) -> Recipe:
    """The recipe of these settings; `start_step` is the backbone's, see `make_optimizer`."""
    method = find_method(prompt.method)
    settings = make_settings(method, prompt.method, prompt.settings)
    rules = optim.method_rules(train.trainable, method)
    update_rule = optim.make_optimizer(optimizer, rules, start_step=start_step)
    return Recipe(model, train, method, settings, update_rule, start_step)


def init_state(
    trainable: Mapping[str, Array],
    optimizer: optax.GradientTransformation,
    step: int,
    averaged: Iterable[str] = (),
) -> TrainState:
    """The state before the first step; trainable parameters are float32.

    `averaged` names those of which a moving average is kept.
    """
    params = {name: jnp.asarray(value, jnp.float32) for name, value in trainable.items()}
    # Copies: a state is donated, and no two of its leaves may be one array.
    average = {name: jnp.copy(params[name]) for name in averaged}
    return TrainState(jnp.int32(step), params, optimizer.init(params), average)


def averaged_names(recipe: Recipe, trainable: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters of which a moving average is kept: with PROMPT_AVERAGE, the trained ones."""
    prompt, _ = split_prompt(trainable)
    names = (name for name in prompt if name not in recipe.method.fixed)
    return tuple(names) if recipe.train.prompt_average else ()


def is_prompt(name: str) -> bool:
    """Whether a parameter is the prompt method's, not the backbone's."""
    return name == "prompt" or name.startswith("prompt/")


def split_prompt(params: Flat) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parameters of the prompt method, and those of the backbone."""
    prompt = {name: value for name, value in params.items() if is_prompt(name)}
    return prompt, {name: value for name, value in params.items() if name not in prompt}


@jax.named_scope("fold")
def fold(
    recipe: Recipe, state: TrainState, frozen: Flat, key: PRNGKeyArray | None = None
) -> Prompt:
    """The prompt of a state, float32; without a key there is no dropout, as in evaluation."""
    params, backbone = split_prompt({**frozen, **state.trainable})
    inputs = Frozen(recipe.model.config, backbone)
    return recipe.method.fold(recipe.settings, params, inputs, key)


def for_use(state: TrainState) -> dict[str, Array]:
    """The trainable parameters that are evaluated and saved: the moving average, if one is kept."""
    return {**state.trainable, **state.average}


def add(
    recipe: Recipe,
    total: Total,
    folded: Prompt,
    state: TrainState,
    frozen: Flat,
    batch: Flat,
    group: Int[Array, ""] | None,
) -> Total:
    """`total` plus the gradient and the metrics of one length group.

    The key of dropout and INPUT_NOISE depends on (random_seed, step) and, if there are several
    groups, on the group's number, so that a resumed run repeats it. Cutting a batch into groups
    changes the draws, not their distribution.
    """
    key = None
    if recipe.model.config.dropout_rate > 0.0 or recipe.train.input_noise:
        key = _step_key(recipe, state)
        key = key if group is None else jax.random.fold_in(key, group)
    _, backbone = split_prompt({**frozen, **state.trainable})
    tuned = {name: value for name, value in backbone.items() if name in state.trainable}
    arrays = folded._replace(lengths=None)  # integers have no gradient
    gradient = jax.grad(group_loss, argnums=(0, 1), has_aux=True)
    (prompt, tuned), metrics = gradient(arrays, tuned, recipe, backbone, folded.lengths, batch, key)
    return jax.tree.map(jnp.add, total, Total(prompt, tuned, metrics))


def group_loss(
    prompt: Prompt,
    tuned: Flat,
    recipe: Recipe,
    backbone: Flat,
    lengths: Int[Array, "*M 5"] | None,
    batch: Flat,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of one length group, summed over its target tokens, and its sums.

    It is differentiated with respect to `prompt` and `tuned`, the trained part of the backbone.
    With INPUT_NOISE the group is predicted twice, with the same units dropped out.
    """
    prompt, backbone = prompt._replace(lengths=lengths), {**backbone, **tuned}
    train, tokens = recipe.train, batch["encoder_input_tokens"]
    dropout_key = key if recipe.model.config.dropout_rate > 0.0 else None
    which = batch.get("which")  # of a prompt with members
    predict = functools.partial(
        forward, recipe.model, backbone, prompt, batch, which, dropout_key=dropout_key
    )
    logits = predict()
    loss, metrics = loss_fn(
        logits, batch, z_loss=train.z_loss, label_smoothing=train.label_smoothing
    )
    if train.input_noise:
        assert key is not None
        noise_key = jax.random.fold_in(key, NOISE)
        noise = draw_noise(backbone, tokens, train.input_noise, noise_key)
        loss += train.input_noise_weight * divergence(logits, predict(noise=noise), batch)
        metrics = {**metrics, "loss": loss}
    return loss, metrics


@jax.named_scope("update")
def update(
    recipe: Recipe, state: TrainState, frozen: Flat, total: Total
) -> tuple[TrainState, Metrics]:
    """The state after a step with the summed gradient and metrics `total`, and its metrics.

    `fold` is run again with the same key, and the sum is pulled back through it. The pullback is
    linear in the sum, so once for all groups is enough.
    """
    params, _ = split_prompt(state.trainable)
    trained = {name: v for name, v in params.items() if name not in recipe.method.fixed}

    def refold(trained: Flat) -> Prompt:
        again = state._replace(trainable={**state.trainable, **trained})
        return fold(recipe, again, frozen, _fold_key(recipe, state))._replace(lengths=None)

    grads = dict(total.backbone)
    if trained:
        (pulled,) = jax.vjp(refold, trained)[1](total.prompt)
        grads |= pulled
    norm = optax.tree.norm(grads)
    grads = {name: grads.get(name, jnp.zeros_like(v)) for name, v in state.trainable.items()}
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.trainable)
    trainable = cast(dict[str, Array], optax.apply_updates(state.trainable, updates))
    # To the bit: adding a zero update would turn -0.0 into 0.0.
    trainable |= {name: v for name, v in params.items() if name not in trained}
    # The norm of the trainable part only: frozen parameters have no gradient.
    metrics = total.metrics | {"gradient_norm": norm}
    average = _update_average(recipe, state, trainable)
    return TrainState(state.step + 1, trainable, opt_state, average), metrics


def _update_average(recipe: Recipe, state: TrainState, trainable: Flat) -> dict[str, Array]:
    """The moving average with one more step.

    Step t of the run has the share (1 - d) / (1 - d^t): the weights of steps 1 to t are in
    proportion to d^(t-1), ..., d, 1 and sum to 1, so that the first values have none.
    """
    if not state.average:
        return {}
    decay, count = recipe.train.prompt_average, state.step + 1 - recipe.start_step
    share = (1.0 - decay) / (1.0 - jnp.float32(decay) ** count)
    new = {name: trainable[name] for name in state.average}
    return cast(dict[str, Array], optax.incremental_update(new, state.average, share))


def zeros(recipe: Recipe, state: TrainState, folded: Prompt) -> Total:
    """A total of zeros, the sum before the first group."""
    _, tuned = split_prompt(state.trainable)
    sums = {name: jnp.float32(0.0) for name in METRICS}
    return jax.tree.map(jnp.zeros_like, Total(folded._replace(lengths=None), tuned, sums))


def whole_step(
    recipe: Recipe, state: TrainState, frozen: Flat, batch: Flat
) -> tuple[TrainState, Metrics]:
    """`train_step` on a batch of one length group, as one program."""
    folded = fold(recipe, state, frozen, _fold_key(recipe, state))
    total = add(recipe, zeros(recipe, state, folded), folded, state, frozen, batch, None)
    return update(recipe, state, frozen, total)


def _step_key(recipe: Recipe, state: TrainState) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(recipe.train.random_seed), state.step)


def _fold_key(recipe: Recipe, state: TrainState) -> PRNGKeyArray:
    return jax.random.fold_in(_step_key(recipe, state), FOLD)


class Programs(NamedTuple):
    """The compiled parts of a step, called by `train_step`."""

    whole: Callable[..., Any]  # (state, frozen, batch) -> (state, metrics); state is donated
    fold: Callable[..., Any]  # (state, frozen) -> folded, as the step folds: with dropout
    zeros: Callable[..., Any]  # (state, folded) -> total
    add: Callable[..., Any]  # (total, folded, state, frozen, batch, group); total is donated
    update: Callable[..., Any]  # (state, frozen, total) -> (state, metrics); state is donated
    fold_for_use: Callable[..., Any]  # (state, frozen) -> the prompt that is evaluated and saved


def compile_step(recipe: Recipe, state: TrainState | None = None) -> Programs:
    """The programs of a step, each compiled once for every shape of a batch or group.

    Results have the shardings of `state`; without a state XLA chooses them.
    """
    shardings = _shardings(state)
    # With debug_nans JAX repeats a step that ends in a NaN, so its arguments must not be donated.
    debugs: bool = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]

    def jit(function: Callable[..., Any], where: Any, *, donate: bool = False) -> Any:
        bound = functools.partial(function, recipe)
        donated = 0 if donate and not debugs else ()
        return jax.jit(bound, donate_argnums=donated, out_shardings=where)

    return Programs(
        whole=jit(whole_step, shardings.state, donate=True),
        fold=jit(_fold_in_step, shardings.folded),
        zeros=jit(zeros, shardings.total),
        add=jit(add, shardings.total, donate=True),
        update=jit(update, shardings.state, donate=True),
        fold_for_use=jit(_fold_for_use, shardings.folded),
    )


def _fold_in_step(recipe: Recipe, state: TrainState, frozen: Flat) -> Prompt:
    return fold(recipe, state, frozen, _fold_key(recipe, state))


def _fold_for_use(recipe: Recipe, state: TrainState, frozen: Flat) -> Prompt:
    return fold(recipe, state._replace(trainable=for_use(state)), frozen)


class _Shardings(NamedTuple):
    """Shardings of what the programs return; None leaves them to XLA."""

    state: Any = None
    total: Any = None
    folded: Any = None


def _shardings(state: TrainState | None) -> _Shardings:
    if state is None:
        return _Shardings()
    of_state = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = of_state.step  # replicated, as metrics and prompts are
    _, tuned = split_prompt(of_state.trainable)
    return _Shardings((of_state, everywhere), Total(everywhere, tuned, everywhere), everywhere)


def train_step(
    programs: Programs, state: TrainState, frozen: Flat, groups: Sequence[Flat]
) -> tuple[TrainState, Metrics]:
    """The state after one step on a batch that is cut into length groups, and its summed metrics.

    The gradient is that of the whole batch. `state` is donated: it must not be used afterwards.
    """
    if len(groups) == 1:
        return programs.whole(state, frozen, groups[0])
    folded = programs.fold(state, frozen)
    total = programs.zeros(state, folded)
    for number, group in enumerate(groups):
        total = programs.add(total, folded, state, frozen, group, np.int32(number))
    del folded  # it may be the state's own memory, which `update` reuses
    return programs.update(state, frozen, total)
