"""What a method is: how a prompt is parametrised, and how its parameters become a `Prompt`.

A method is one file beside this one, and one line in `table.py`. The session calls `first_params`
once; each training step calls the method's `fold`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model.prompt import Prompt

Visibility = Literal["input", "prompt"]
Params = dict[str, Array]  # flat, float32: {"prompt": ...}, or {"prompt/NAME": ..., ...}


class Start(NamedTuple):
    """What the first parameters are made of."""

    key: PRNGKeyArray  # for what a method draws itself; the rows of `draw_rows` have their own
    model: ModelConfig
    length: int  # P
    draw_rows: Callable[[int], Float[Array, "n D"]]  # n first rows by PROMPT_INIT
    init: str = "auto"  # PROMPT_INIT as it is set; "auto": the method may begin as published
    tasks: tuple[str, ...] = ()  # that it is trained on, in the order of their names
    backbone: Mapping[str, Array] = {}  # for a method that begins with what the frozen T5 computes
    file: Prompt | None = None  # the prompt of PROMPT_INIT = 'file', for a method without rows


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
    fields: tuple[str, ...] = ("rows",)  # those of `Prompt` that fold fills, with some settings
    members: bool = False
    """Whether fold returns one member for each of `Start.tasks`, in that order. Each row of a batch
    is given its task's. A task has parameters of its own: in one array, a task that a batch lacks
    would change Adafactor's clipped update of the others."""
    shared: str = ""  # the leaf of the rows that all members share, which is saved beside them
    visibility: Visibility = "input"
    """What its rows see. "prompt": nothing but each other, so that what is saved for use is not the
    folded prompt but the rows, `params["prompt"]`, which whoever has the backbone folds."""


def first_params(name: str, method: Method, settings: Any, start: Start) -> Params:
    """The parameters before the first step, once they are known to fold to a prompt of the model.

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
        start.backbone,
    )
    check_prompt(name, method, folded, start)
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


def check_prompt(name: str, method: Method, prompt: Any, start: Start) -> None:
    """Raises ConfigError unless the prompt has the method's `fields`, as the model takes them."""
    problem = f"PROMPT_METHOD = {name!r}: its fold"
    if not isinstance(prompt, Prompt):
        raise ConfigError(
            f"{problem} returns {type(prompt).__name__}. Expected a Prompt. "
            "Return Prompt(rows=rows)."
        )
    expected = shapes_of_fields(start.model, start.length)
    if "rows" not in method.fields:
        expected["rows"] = (0, start.model.embed_dim)
    if method.members:
        expected = {field: (len(start.tasks), *shape) for field, shape in expected.items()}
    if prompt.lengths is not None:
        raise ConfigError(
            f"{problem} returns lengths. Expected a prompt whose members are all full. Leave them "
            "out."
        )
    for field in Prompt._fields:
        value = getattr(prompt, field)
        if value is None:
            continue
        if field != "rows" and field not in method.fields:
            raise ConfigError(
                f"{problem} returns {field}, which its `fields` do not name: "
                f"{', '.join(method.fields)}. Expected no other. Add it to `fields`."
            )
        if tuple(value.shape) != expected[field] or value.dtype != jnp.float32:
            raise ConfigError(
                f"{problem} returns {field} of shape {tuple(value.shape)} and {value.dtype}. "
                f"Expected {expected[field]} and float32, for PROMPT_LENGTH = {start.length} and "
                f"this model{' and these tasks' if method.members else ''}."
            )


def shapes_of_fields(model: ModelConfig, length: int) -> dict[str, tuple[int, ...]]:
    """The shape of every field of a prompt without members, at one length for all."""
    heads = (2, length, model.num_heads, model.head_dim)
    return {
        "rows": (length, model.embed_dim),
        "encoder": (model.num_encoder_layers, *heads),
        "decoder": (model.num_decoder_layers, *heads),
        "cross": (model.num_decoder_layers, *heads),
        "memory": (length, model.embed_dim),
    }
