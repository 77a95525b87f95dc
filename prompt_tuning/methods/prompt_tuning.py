"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): the rows themselves are learned.

prompt = P, float[P, D], the only parameter.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import PRNGKeyArray

from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """There are none: the length and the first rows are settings of every method."""


def init(settings: Settings, start: Start) -> Params:
    """{"prompt": float[P, D]}: the first rows."""
    return {"prompt": start.draw_rows(start.length)}


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The rows as they are."""
    return Prompt(rows=params["prompt"])


METHOD = Method(Settings, init, fold, starts=STARTS)
