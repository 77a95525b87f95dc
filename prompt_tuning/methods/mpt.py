"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): shared rows, scaled for each task.

    prompt_k = S * (u_k v_k^T), elementwise

S, float[P, D], are rows that all tasks share; u_k, float[P], and v_k, float[D], are a task's own.
u and v begin as ones, so that each task begins at S. (PEFT draws both from N(0, 0.02^2): its prompt
begins near 0.) The paper learns S with distillation from prompts of single tasks, which is not done
here. Trained: P D + M (P + D) for M tasks.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.methods.multitask import stack_tasks
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """There are none."""


def init(settings: Settings, start: Start) -> Params:
    """The first rows, and ones for every task."""
    params = {"prompt/shared": start.draw_rows(start.length)}
    for task in start.tasks:
        params[f"prompt/{task}/of_rows"] = jnp.ones(start.length, jnp.float32)
        params[f"prompt/{task}/of_columns"] = jnp.ones(start.model.embed_dim, jnp.float32)
    return params


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """A member for each task: the shared rows, scaled."""
    of_rows, of_columns = stack_tasks(params, "of_rows"), stack_tasks(params, "of_columns")
    return Prompt(rows=params["prompt/shared"] * of_rows[:, :, None] * of_columns[:, None, :])


METHOD = Method(Settings, init, fold, starts=STARTS, members=True, shared="prompt/shared")
