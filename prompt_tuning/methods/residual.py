"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): rows and a shared MLP.

    prompt_i = P_i + LayerNorm(W_up ReLU(W_down P_i + b_down) + b_up)

P is float[P, D], `hidden` is the width between the two matrices. The MLP is shared by the rows and
normalised before it is added, as in the authors' code. That code begins with sampled vocabulary,
hidden 800 and PyTorch's first values. A normalised row has norm sqrt(D), about 28 for D = 768; rows
of LM-adapted T5's vocabulary have norms of about 300, so the prompt begins near P.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.dense import dense, init_dense
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt

EPSILON = 1e-5  # of the variance, as in torch.nn.LayerNorm


@dataclasses.dataclass(frozen=True)
class Settings:
    """The MLP's size."""

    hidden: int = 800

    def __post_init__(self) -> None:
        check(
            self.hidden >= 1,
            f"PROMPT_SETTINGS = {{'hidden': {self.hidden}}}: the MLP has no width. Expected 1 or "
            "more.",
        )


def init(settings: Settings, start: Start) -> Params:
    """The first rows, and the MLP and LayerNorm as PyTorch begins them."""
    down, up = jax.random.split(start.key)
    width = start.model.embed_dim
    return {
        "prompt/rows": start.draw_rows(start.length),
        **init_dense(down, "prompt/down", width, settings.hidden),
        **init_dense(up, "prompt/up", settings.hidden, width),
        "prompt/norm_scale": jnp.ones(width, jnp.float32),
        "prompt/norm_bias": jnp.zeros(width, jnp.float32),
    }


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The rows, each with what the MLP makes of it."""
    rows = params["prompt/rows"]
    branch = dense(params, "prompt/up", jax.nn.relu(dense(params, "prompt/down", rows)))
    centred = branch - branch.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    normalised = centred / jnp.sqrt(variance + EPSILON)
    return Prompt(rows=rows + normalised * params["prompt/norm_scale"] + params["prompt/norm_bias"])


METHOD = Method(Settings, init, fold, starts=STARTS)
