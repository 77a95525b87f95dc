"""Low-rank prompts: a product of two thin matrices, in three published forms.

    form 'ulpt'   prompt = (Z R) * s + b      R float[r, D] is fixed; Z, s and b are trained
    form 'dpt'    prompt = Z B                both are trained; LoPT-1 is the same formula
    form 'lopt2'  prompt = ReLU(X U) V        X float[P, D] is fixed; U and V are trained

Z is float[P, r], r is `rank`. Sources and first values, with PROMPT_INIT = 'auto':
ULPT (arXiv 2502.04501, 3.2): Z and R ~ N(0, 1), s = 1, b = 0. (Its code draws R uniformly, with
variance 2 / (r + D); T5's vocabulary is nearer to N(0, 1) with r = 64.) Trained: r P + 2 D.
DPT (Xiao et al., Findings of EMNLP 2023): both uniform in [-0.5, 0.5]. Trained: r (P + D).
LoPT-2 (arXiv 2406.19486) names neither its nonlinearity nor its first values: X is the first rows,
U begins as torch.nn.Linear's kernel, V as below. Trained: 2 r D.
With any other PROMPT_INIT the prompt begins as near to those rows as its rank allows: by least
squares for Z (b is the rows' mean) or V, by the singular value decomposition for 'dpt'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.dense import uniform
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """The form, and its rank."""

    form: Literal["ulpt", "dpt", "lopt2"] = "ulpt"
    rank: int = 64

    def __post_init__(self) -> None:
        check(
            self.rank >= 1,
            f"PROMPT_SETTINGS = {{'rank': {self.rank}}}: there is no product. Expected 1 or more.",
        )


def init(settings: Settings, start: Start) -> Params:
    """The factors, as published or as near to the first rows as the rank allows."""
    make = {"ulpt": _init_ulpt, "dpt": _init_dpt, "lopt2": _init_lopt2}[settings.form]
    return {leaf: jnp.asarray(value, jnp.float32) for leaf, value in make(settings, start).items()}


def _init_ulpt(settings: Settings, start: Start) -> Mapping[str, ArrayLike]:
    first, second = jax.random.split(start.key)
    width = start.model.embed_dim
    basis = jax.random.normal(second, (settings.rank, width))
    codes: ArrayLike = jax.random.normal(first, (start.length, settings.rank))
    shift = np.zeros(width)
    if start.init != "auto":
        rows = np.asarray(start.draw_rows(start.length), np.float64)
        shift = rows.mean(axis=0)
        codes = np.linalg.lstsq(np.asarray(basis, np.float64).T, (rows - shift).T)[0].T
    return {
        "prompt/fixed_basis": basis,
        "prompt/codes": codes,
        "prompt/scale": np.ones(width),
        "prompt/shift": shift,
    }


def _init_dpt(settings: Settings, start: Start) -> Mapping[str, ArrayLike]:
    first, second = jax.random.split(start.key)
    codes = np.array(uniform(first, (start.length, settings.rank), 0.5))
    basis = np.array(uniform(second, (settings.rank, start.model.embed_dim), 0.5))
    if start.init != "auto":
        rows = np.asarray(start.draw_rows(start.length), np.float64)
        left, values, right = np.linalg.svd(rows, full_matrices=False)
        used = min(settings.rank, len(values))
        root = np.sqrt(values[:used])
        codes[:, :used], codes[:, used:] = left[:, :used] * root, 0  # a larger rank: begins unused
        basis[:used] = right[:used] * root[:, None]
    return {"prompt/codes": codes, "prompt/basis": basis}


def _init_lopt2(settings: Settings, start: Start) -> Mapping[str, ArrayLike]:
    rows = np.asarray(start.draw_rows(start.length), np.float64)
    width = rows.shape[1]
    down = uniform(start.key, (width, settings.rank), width**-0.5)
    up = np.linalg.lstsq(np.maximum(rows @ np.asarray(down, np.float64), 0), rows)[0]
    return {"prompt/fixed_rows": rows, "prompt/down": down, "prompt/up": up}


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The product."""
    if settings.form == "ulpt":
        product = params["prompt/codes"] @ params["prompt/fixed_basis"]
        return Prompt(rows=product * params["prompt/scale"] + params["prompt/shift"])
    if settings.form == "dpt":
        return Prompt(rows=params["prompt/codes"] @ params["prompt/basis"])
    hidden = jax.nn.relu(params["prompt/fixed_rows"] @ params["prompt/down"])
    return Prompt(rows=hidden @ params["prompt/up"])


METHOD = Method(
    Settings,
    init,
    fold,
    starts=STARTS,
    fixed=("prompt/fixed_basis", "prompt/fixed_rows"),  # of 'ulpt', of 'lopt2'
)
