"""Multi-task prompts: rows that all tasks share, combined with parameters of each task.

    form 'add'       prompt_k = S + T_k          T_k is float[P, D]
    form 'concat'    prompt_k = [S; T_k]         T_k is float[p, D], S float[P - p, D]
    form 'project'   prompt_k = S W_k + b_k      W_k is float[D, D], b_k float[D]

S are the shared rows, float[P, D]; k is one of the tasks of a mixture; p is `task_length`. All of
them are trained. These are forms of the multi-task prompts in the code of Lester et al. (2021,
prompt_tuning/extended), which has no publication of its own and draws every array uniformly from
[0, 0.5). Here S begins as the first rows, T_k and b_k as zeros and W_k as the identity, so that
each task begins at S. In 'concat' the first rows are S and T_k together. If S is read from a file,
T_k begins uniformly in [-0.5, 0.5] there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.inits import STARTS, random_uniform
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """The form, and how many of the rows of 'concat' are a task's own."""

    form: Literal["add", "concat", "project"] = "add"
    task_length: int | None = None  # None: half of PROMPT_LENGTH, rounded down

    def __post_init__(self) -> None:
        check(
            self.task_length is None or (self.form == "concat" and self.task_length >= 1),
            f"PROMPT_SETTINGS = {{'task_length': {self.task_length}}}: it is how many rows of "
            "'concat' are a task's own. Expected 1 or more, and form 'concat'.",
        )


def init(settings: Settings, start: Start) -> Params:
    """The shared rows, and what leaves them as they are for every task.

    Raises:
      ConfigError: PROMPT_LENGTH leaves no row for the task, or none to be shared.
    """
    length, width = start.length, start.model.embed_dim
    if settings.form == "concat":
        number = length // 2 if settings.task_length is None else settings.task_length
        check(
            1 <= number < length,
            f"PROMPT_LENGTH = {length}: {number} rows of 'concat' are a task's own, the others are "
            "shared. Expected 1 or more of both. Raise PROMPT_LENGTH or lower task_length.",
        )
        length -= number
    if settings.form == "add":
        shared, own = start.draw_rows(length), {"rows": jnp.zeros((length, width), jnp.float32)}
    elif settings.form == "project":
        shared = start.draw_rows(length)
        own = {"kernel": jnp.eye(width, dtype=jnp.float32), "bias": jnp.zeros(width, jnp.float32)}
    elif start.init == "file":  # of shared rows
        shared = start.draw_rows(length)
        own = {"rows": random_uniform(start.key, (start.length - length, width))}
    else:
        rows = start.draw_rows(start.length)
        shared, own = rows[:length], {"rows": rows[length:]}
    return {"prompt/shared": shared} | {
        f"prompt/{task}/{leaf}": jnp.array(value)  # a copy: each is an array of its own
        for task in start.tasks
        for leaf, value in own.items()
    }


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """A member for each task: the shared rows combined with its own."""
    shared = params["prompt/shared"]
    if settings.form == "project":
        kernels, biases = stack_tasks(params, "kernel"), stack_tasks(params, "bias")
        return Prompt(rows=shared @ kernels + biases[:, None])
    own = stack_tasks(params, "rows")
    if settings.form == "add":
        return Prompt(rows=shared + own)
    repeated = jnp.broadcast_to(shared, (len(own), *shared.shape))
    return Prompt(rows=jnp.concatenate([repeated, own], axis=1))


def stack_tasks(params: Params, leaf: str) -> Float[Array, "M *shape"]:
    """The arrays prompt/TASK/leaf of all tasks, in the order of their names."""
    names = sorted(name.split("/")[1] for name in params if name.endswith(f"/{leaf}"))
    return jnp.stack([params[f"prompt/{name}/{leaf}"] for name in names])


METHOD = Method(Settings, init, fold, starts=STARTS, members=True, shared="prompt/shared")
