"""The trainable mask and the optimiser, the same in both engines.

`step.py` differentiates only the parameters that the rules label as trained. The T5X plugin passes
the whole tree to the same transformation, which sets the updates of the rest to zero.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prompt_tuning.config import OptimizerConfig
from prompt_tuning.methods.method import Method

# "train", "freeze", or, for parameters with a learning rate of their own, its factor ("0.1").
Label = str
Rules = tuple[tuple[str, Label], ...]
TRAIN, FREEZE = "train", "freeze"

_BACKBONE = r"(token_embedder|encoder|decoder)/.*"
# The first pattern that matches a whole name decides. "prompt" is the name in this project; the
# longer pattern is the name in T5X's parameter tree.
_PROMPT = r"prompt(/.+)?|encoder/prompt/.*"
PROMPT_RULES: Rules = ((_PROMPT, TRAIN), (_BACKBONE, FREEZE))
MODEL_RULES: Rules = ((_PROMPT, FREEZE), (_BACKBONE, TRAIN))
RULES: Mapping[str, Rules] = {"prompt": PROMPT_RULES, "model": MODEL_RULES}


def method_rules(trainable: str, method: Method) -> Rules:
    """The rules of TRAINABLE, after those of the method's fixed leaves and learning rates."""
    if trainable == "model":
        return MODEL_RULES
    labels = [(name, FREEZE) for name in method.fixed]
    labels += [(name, str(float(factor))) for name, factor in method.rates.items()]
    return (
        *((rf"(encoder/prompt/prompt/)?{re.escape(name)}", label) for name, label in labels),
        *PROMPT_RULES,
    )


def label_names(names: Iterable[str], rules: Rules) -> dict[str, Label]:
    """The label of every parameter name.

    Raises:
      ValueError: a name matches no pattern, so that no parameter is frozen by accident.
    """
    labels: dict[str, Label] = {}
    unmatched = []
    for name in names:
        label: Label | None = next(
            (kind for regex, kind in rules if re.fullmatch(regex, name)), None
        )
        if label is None:
            unmatched.append(name)
        else:
            labels[name] = label
    if unmatched:
        raise ValueError(
            f"the trainable patterns leave {len(unmatched)} parameters unmatched: "
            f"{', '.join(unmatched[:5])}. Patterns: {[p for p, _ in rules]}. Add a pattern."
        )
    return labels


def label_tree(params: Any, rules: Rules) -> Any:
    """`label_names` for a tree, nested or flat: the same tree with a label at every leaf."""

    def name(path: tuple[Any, ...]) -> str:
        return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    labels = label_names([name(path) for path, _ in leaves], rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: labels[name(path)], params)


def split_params(
    params: Mapping[str, jax.Array], rules: Rules
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The trainable and the frozen part of flat parameters; together they are `params`."""
    labels = label_names(params, rules)
    trainable = {name: value for name, value in params.items() if labels[name] != FREEZE}
    frozen = {name: value for name, value in params.items() if labels[name] == FREEZE}
    return trainable, frozen


def learning_rate(config: OptimizerConfig, start_step: int = 0) -> float | Callable[[Any], Any]:
    """The rate at each step of this run: constant after a linear warm-up, or T5's `rsqrt`.

    `rsqrt` counts the backbone's own steps as well, as T5X does: `start_step` is where it begins.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule="rsqrt", warmup_steps=10_000)
    >>> rate = learning_rate(config, start_step=1_000_000)
    >>> round(float(rate(0)), 6)
    0.001
    """
    if config.schedule == "rsqrt":
        return lambda count: (
            config.learning_rate
            * jax.lax.rsqrt(
                jnp.maximum(jnp.float32(start_step) + count, jnp.float32(config.warmup_steps))
            )
        )
    if config.warmup_steps == 0:
        return config.learning_rate
    # The first step has 1 / warmup_steps of the rate, not 0.
    return optax.schedules.linear_schedule(
        config.learning_rate / config.warmup_steps,
        config.learning_rate,
        max(config.warmup_steps - 1, 1),
    )


def make_optimizer(
    config: OptimizerConfig, rules: Rules, *, start_step: int = 0
) -> optax.GradientTransformation:
    """The transformation that updates what `rules` train and sets the rest to exactly zero.

    `start_step` is where Adafactor's second-moment decay `1 - t^-0.8` starts. T5X restores the
    backbone's own step, 1,100,000 for the public LM-adapted checkpoints, with empty moments: the
    decay is then nearly 1 and every update is clipped to RMS = learning rate. That is the paper's
    optimiser; 0 gives a moving average. `config.start_step` overrides it.
    """
    factors = {
        label: 1.0 if label == TRAIN else float(label) for _, label in rules if label != FREEZE
    }
    # Not optax.masked: it passes the raw gradients of unmasked parameters on as updates.
    return optax.partition(
        {
            FREEZE: optax.set_to_zero(),
            **{label: _update_rule(config, x, start_step) for label, x in factors.items()},
        },
        lambda params: label_tree(params, rules),
    )


def _update_rule(
    config: OptimizerConfig, factor: float, start_step: int
) -> optax.GradientTransformation:
    """Adafactor or AdamW, with `factor` times the learning rate."""
    start = start_step if config.start_step is None else config.start_step
    config = dataclasses.replace(config, learning_rate=factor * config.learning_rate)
    rate = learning_rate(config, start_step)
    if config.name == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.adafactor(
        rate,
        decay_rate=config.decay_rate,
        decay_offset=-start,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
        clipping_threshold=config.clipping_threshold,
        # As T5X: p <- (1 - decay) p - update, not multiplied by the learning rate.
        weight_decay_rate=config.weight_decay,
    )
