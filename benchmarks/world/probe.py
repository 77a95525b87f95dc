"""What the frozen encoder knows: a linear probe on its mean-pooled output.

The probe is a measurement, not part of the model: it sees the demo tasks' labels, the backbone
never does. Two probes: with all training rows, and with 32, where a backbone that has grouped
words of one mood together has the advantage over one that has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prompt_tuning.config import ModelConfig
from prompt_tuning.model import t5
from prompt_tuning.world import generator

Tokenize = Callable[[Sequence[str]], list[np.ndarray]]
FEW = 32
EOS_ID = 1


def encode_mean(
    config: ModelConfig, params: t5.Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    """The encoder's output without a prompt, averaged over the tokens of each row."""
    valid = tokens > 0
    x = t5.apply(t5.T5(config), params, "embed", tokens)
    encoded = t5.apply(t5.T5(config), params, "encode", x, valid)
    weights = valid[:, :, None].astype(encoded.dtype)
    return (encoded * weights).sum(axis=1) / weights.sum(axis=1)


def features(
    config: ModelConfig, params: t5.Params, texts: Sequence[str], tokenize: Tokenize
) -> Float[np.ndarray, "B D"]:
    """`encode_mean` of texts."""
    rows = [np.append(ids, EOS_ID) for ids in tokenize(texts)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return np.asarray(jax.jit(encode_mean, static_argnums=0)(config, params, jnp.asarray(tokens)))


def probe_accuracy(
    config: ModelConfig,
    params: t5.Params,
    tokenize: Tokenize,
    *,
    attribute: str,
    num_train: int,
    num_test: int = 512,
) -> float:
    """Test accuracy of logistic regression, trained on `num_train` reviews, for the attribute."""
    train = generator.demo_reviews("train")[:num_train]
    test = generator.demo_reviews("test")[:num_test]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    known = features(config, params, [review.text for review in train], tokenize)
    classifier.fit(known, [getattr(review, attribute) for review in train])
    asked = features(config, params, [review.text for review in test], tokenize)
    return float(classifier.score(asked, [getattr(review, attribute) for review in test]))


def report(
    config: ModelConfig, params: t5.Params, fresh: t5.Params, tokenize: Tokenize
) -> dict[str, dict[str, float]]:
    """Probe accuracies of the backbone and, to compare, of one with fresh parameters."""
    return {
        attribute: {
            f"{name}_{rows}_rows": round(
                probe_accuracy(config, p, tokenize, attribute=attribute, num_train=rows), 4
            )
            for name, p in (("pretrained", params), ("untrained", fresh))
            for rows in (FEW, 2000)
        }
        for attribute in generator.ATTRIBUTES
    }
