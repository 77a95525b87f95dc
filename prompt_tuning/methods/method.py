"""What a method is: how a prompt is parametrised, and how its parameters become a `Prompt`.

A method is one file beside this one, and one line in `table.py`. The session calls `first_params`
once; each training step calls the method's `fold`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model.prompt import Prompt, other_fields

Params = dict[str, Array]  # flat, float32: {"prompt": ...}, or {"prompt/NAME": ..., ...}


class Start(NamedTuple):
    """What the first parameters are made of."""

    key: PRNGKeyArray  # for what a method draws itself; the rows of `draw_rows` have their own
    model: ModelConfig
    length: int  # P
    draw_rows: Callable[[int], Float[Array, "n D"]]  # n first rows by PROMPT_INIT
    init: str = "auto"  # PROMPT_INIT as it is set; "auto": the method may begin as published
    tasks: tuple[str, ...] = ()


class Frozen(NamedTuple):
    """The backbone, for a method whose fold reads it."""

    model: ModelConfig
    params: Mapping[str, Array]


class Method(NamedTuple):
    """How a prompt is parametrised and learned."""

    Settings: type  # a frozen dataclass; every field has a default
    init: Callable[[Any, Start], Params]  # (settings, start); float32
    fold: Callable[[Any, Params, Frozen, PRNGKeyArray | None], Prompt]
    """(settings, params, frozen, key): pure and differentiable, with float32 leaves. Without a key
    nothing is dropped out."""
    starts: tuple[str, ...]  # the PROMPT_INITs that it takes, besides 'auto'
    fixed: tuple[str, ...] = ()  # leaves that are not trained; some settings may not have them
    rates: Mapping[str, float] = {}  # leaves with a learning rate of their own, as a factor


def first_params(
    name: str, method: Method, settings: Any, start: Start, backbone: Mapping[str, Array]
) -> Params:
    """The parameters before the first step, once they are known to fold to `start.length` rows.

    `fold` is not run, only traced for its shapes.

    Raises:
      ConfigError: the method does not take this PROMPT_INIT, or its `init` or `fold` does not
        return what a method's should.
    """
    if start.init != "auto" and start.init not in method.starts:
        raise ConfigError(
            f"PROMPT_INIT = {start.init!r}: PROMPT_METHOD = {name!r} cannot begin so. Expected "
            f"{', '.join(map(repr, ('auto', *method.starts)))}. Set PROMPT_INIT = 'auto'."
        )
    params = method.init(settings, start)
    check_params(name, method, params)
    folded = jax.eval_shape(
        lambda params, backbone: method.fold(settings, params, Frozen(start.model, backbone), None),
        params,
        dict(backbone),
    )
    check_prompt(name, folded, (start.length, start.model.embed_dim))
    return {leaf: jnp.asarray(value) for leaf, value in params.items()}


def check_params(name: str, method: Method, params: Any) -> None:
    """Raises ConfigError unless they are named as parameters of a prompt, and are float32."""
    problem = f"PROMPT_METHOD = {name!r}: its init"
    if not isinstance(params, dict) or not params:
        raise ConfigError(
            f"{problem} returns {type(params).__name__} {params!r:.80}. Expected a dict of arrays. "
            "Return {'prompt': rows}."
        )
    for leaf, value in params.items():
        is_named = str(leaf).startswith("prompt/") or (leaf == "prompt" and len(params) == 1)
        if not is_named or str(leaf).endswith("/"):
            raise ConfigError(
                f"{problem} names a parameter {leaf!r}. Expected 'prompt' alone, or 'prompt/NAME' "
                "for each of several. Rename it."
            )
        dtype = getattr(value, "dtype", type(value).__name__)
        if dtype != jnp.float32:
            raise ConfigError(
                f"{problem} returns {leaf!r} as {dtype}. Expected an array of float32. "
                "Convert it with jnp.asarray(value, jnp.float32)."
            )
    if set(params) <= set(method.fixed):
        raise ConfigError(
            f"{problem} returns only parameters that its `fixed` names, {', '.join(params)}. "
            "Expected one or more to train. Take them out of `fixed`."
        )


def check_prompt(name: str, prompt: Any, shape: tuple[int, int]) -> None:
    """Raises ConfigError unless the prompt is so many rows of that width, float32."""
    problem = f"PROMPT_METHOD = {name!r}: its fold"
    if not isinstance(prompt, Prompt):
        raise ConfigError(
            f"{problem} returns {type(prompt).__name__}. Expected a Prompt. "
            "Return Prompt(rows=rows)."
        )
    if others := other_fields(prompt):
        raise ConfigError(
            f"{problem} returns {', '.join(others)} beside rows, which no engine computes. "
            "Expected rows alone. Return Prompt(rows=rows)."
        )
    rows = prompt.rows
    if tuple(rows.shape) != shape or rows.dtype != jnp.float32:
        raise ConfigError(
            f"{problem} returns rows of shape {tuple(rows.shape)} and {rows.dtype}. Expected "
            f"{shape} and float32, PROMPT_LENGTH rows of the model's width (EMBED_DIM)."
        )
