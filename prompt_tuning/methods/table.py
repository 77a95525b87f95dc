"""The methods by name, a user's own among them, and their settings."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning.config import ConfigError, ModelConfig, PromptConfig
from prompt_tuning.config.gin_files import convert, describe, fits, suggest
from prompt_tuning.methods import (
    low_rank,
    mpt,
    multitask,
    p_tuning,
    p_tuning_v2,
    prefix_tuning,
    prompt_tuning,
    residual,
    shared_prompt,
    superpos,
)
from prompt_tuning.methods.method import Frozen, Method, Params, Start, first_params
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt

METHODS: Mapping[str, Method] = {
    "prompt_tuning": prompt_tuning.METHOD,
    "p_tuning": p_tuning.METHOD,
    "residual": residual.METHOD,
    "superpos": superpos.METHOD,
    "low_rank": low_rank.METHOD,
    "prefix_tuning": prefix_tuning.METHOD,
    "p_tuning_v2": p_tuning_v2.METHOD,
    "shared_prompt": shared_prompt.METHOD,
    "multitask": multitask.METHOD,
    "mpt": mpt.METHOD,
}


def find_method(name: str) -> Method:
    """The method of that name, or a user's own by its place, 'my_module.METHOD'.

    A module of the working directory is found, as the one that MIXTURE_OR_TASK_MODULE names.

    Raises:
      ConfigError: there is no such method, or its module cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    module, dot, attribute = name.rpartition(".")
    problem = f"PROMPT_METHOD = {name!r}:"
    if not dot or not module:
        raise ConfigError(
            f"{problem} there is no such method.{suggest(name, METHODS)} Expected one of "
            f"{', '.join(METHODS)}, or 'my_module.METHOD' for one of your own."
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        what = (
            f"there is no module {missing!r} in the working directory, in PYTHONPATH or among the "
            "installed packages"
            if module == missing or module.startswith(missing + ".")
            else f"{module!r} imports {missing!r}, which is not installed"
        )
        raise ConfigError(f"{problem} {what}.") from error
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{problem} importing {module!r} failed with {type(error).__name__}: {error}."
        ) from error
    method = getattr(imported, attribute, None)
    if not isinstance(method, Method):
        methods = [key for key, value in vars(imported).items() if isinstance(value, Method)]
        raise ConfigError(
            f"{problem} {module} has no Method of that name.{suggest(attribute, methods)} Expected "
            f"{attribute} = Method(Settings, init, fold, starts=...) in {imported.__file__}."
        )
    if not (isinstance(method.Settings, type) and dataclasses.is_dataclass(method.Settings)):
        raise ConfigError(
            f"{problem} its Settings are {method.Settings!r}. Expected a frozen dataclass. "
            "Write @dataclasses.dataclass(frozen=True) above the class."
        )
    return method


def make_settings(method: Method, name: str, values: Mapping[str, Any]) -> Any:
    """The method's Settings, with these values and its defaults.

    Raises:
      ConfigError: a field is misspelt, has the wrong type or an impossible value.
    """
    hints = typing.get_type_hints(method.Settings)
    fields = [field.name for field in dataclasses.fields(method.Settings) if field.init]
    settings = {}
    for field, value in values.items():
        if field not in fields:
            raise ConfigError(
                f"PROMPT_SETTINGS names {field!r}: PROMPT_METHOD = {name!r} has no such setting."
                f"{suggest(str(field), fields)} Expected {', '.join(fields) or 'an empty dict'}."
            )
        settings[field] = convert(value, hints[field])
        if not fits(settings[field], hints[field]):
            raise ConfigError(
                f"PROMPT_SETTINGS = {{{field!r}: {value!r}}}: wrong type for PROMPT_METHOD = "
                f"{name!r}. Expected {describe(hints[field])}."
            )
    return method.Settings(**settings)


def trace_method(
    config: PromptConfig, model: ModelConfig, tasks: tuple[str, ...] = ("task",)
) -> tuple[Params, Prompt]:
    """The method's parameters, begun with rows of zeros, and the shapes of the prompt they fold to.

    No backbone is needed, and no value of an init changes a shape.

    Raises:
      ConfigError: see `first_params`.
    """
    method = find_method(config.method)
    settings = make_settings(method, config.method, config.settings)
    backbone: Any = t5.param_shapes(model)
    start = Start(
        jax.random.key(0),
        model,
        config.length,
        draw_rows=lambda number: jnp.zeros((number, model.embed_dim)),
        tasks=tasks,
        backbone=backbone,
    )
    params = first_params(config.method, method, settings, start)
    prompt = jax.eval_shape(
        lambda params, backbone: method.fold(settings, params, Frozen(model, backbone), None),
        params,
        backbone,
    )
    return params, prompt
