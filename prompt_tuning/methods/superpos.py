"""SuperPos-Prompt (Sadraei Javaheri et al. 2024, arXiv 2406.05279): rows are sums of tokens.

    prompt_i = sum_j w_ij E_j,    with `train_tokens`    prompt_i = sum_j w_ij (E_j + d_ij)

E, float[m, D], are the embeddings of m `tokens`, drawn once and not trained. The weights w,
float[P, m], are free: no softmax, any sign. d, float[P, m, D], begins at 0; it costs P * m * D
parameters. The paper's gain stops growing at m = 128; it trains with dropout off. How it begins is
not published: here w is one-hot, so that the first P rows are the first P of the m tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from prompt_tuning.config.setting import check
from prompt_tuning.methods.method import Frozen, Method, Params, Start
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many tokens a row is a sum of, and whether a row changes them."""

    tokens: int = 128
    train_tokens: bool = False

    def __post_init__(self) -> None:
        check(
            self.tokens >= 1,
            f"PROMPT_SETTINGS = {{'tokens': {self.tokens}}}: a row is a sum of tokens. Expected 1 "
            "or more.",
        )


def init(settings: Settings, start: Start) -> Params:
    """The tokens, and one-hot weights.

    Raises:
      ConfigError: there are more rows than tokens.
    """
    length, tokens = start.length, settings.tokens
    check(
        tokens >= length,
        f"PROMPT_SETTINGS = {{'tokens': {tokens}}}: fewer than PROMPT_LENGTH = {length}, but each "
        f"row begins as a token of its own. Expected {length} or more. Raise tokens or lower "
        "PROMPT_LENGTH.",
    )
    params = {
        "prompt/fixed_tokens": start.draw_rows(tokens),
        "prompt/weights": jnp.eye(length, tokens, dtype=jnp.float32),
    }
    if settings.train_tokens:
        shape = (length, tokens, start.model.embed_dim)
        params["prompt/token_changes"] = jnp.zeros(shape, jnp.float32)
    return params


def fold(settings: Settings, params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Prompt:
    """The weighted sums of the tokens."""
    weights = params["prompt/weights"]
    rows = weights @ params["prompt/fixed_tokens"]
    if settings.train_tokens:
        rows = rows + jnp.einsum("PM,PMD->PD", weights, params["prompt/token_changes"])
    return Prompt(rows=rows)


METHOD = Method(
    Settings,
    init,
    fold,
    starts=("sampled_vocab", "class_labels", "text"),  # rows that are made of tokens
    fixed=("prompt/fixed_tokens",),
)
