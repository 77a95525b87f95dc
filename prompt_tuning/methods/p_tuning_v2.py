"""P-tuning v2 (Liu et al. 2022, arXiv 2110.07602) on T5: a prefix in the encoder alone.

    prompt.encoder = float[N, 2, P, H, K], the only parameter

The paper tunes models that are encoders only, with a new classification head. A T5 answers with
words, so there is none: the rest is the method, keys and values in front of every encoder layer,
learned directly and begun with normal draws.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import PRNGKeyArray

from prompt_tuning.methods import prefix_tuning
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt

ENCODER = prefix_tuning.Settings(decoder=False, cross=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """There are none: prefix_tuning has other places, an MLP and dropout."""


def init(settings: Settings, start: Start) -> Params:
    """{"prompt/encoder": float[N, 2, P, H, K]}."""
    return prefix_tuning.init(ENCODER, start)


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The keys and values as they are."""
    return prefix_tuning.fold(ENCODER, params, frozen, key)


METHOD = Method(Settings, init, fold, prefix_tuning.METHOD.starts, fields=("encoder",))
