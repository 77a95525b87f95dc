"""How a prompt begins: random, sampled vocabulary, class labels or a text (paper 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.config import ConfigError, PromptConfig

# PROMPT_INITs that draw rows. 'auto' is one of them, chosen by the task.
STARTS = ("random_uniform", "sampled_vocab", "class_labels", "text", "file")
Encode = Callable[[str], Sequence[int]]  # text -> ids, without end-of-sequence


def random_uniform(
    key: PRNGKeyArray, shape: tuple[int, int], scale: float = 0.5
) -> Float[Array, "P D"]:
    """Draws from [-scale, scale]; the paper's interval is [-0.5, 0.5] (3.2)."""
    return jax.random.uniform(key, shape, jnp.float32, minval=-scale, maxval=scale)


def sampled_vocab(
    key: PRNGKeyArray, embedding: Float[Array, "V D"], length: int, population: int = 5000
) -> Float[Array, "P D"]:
    """Embeddings of `length` different pieces among the `population` most common ones.

    SentencePiece ids are ordered by frequency, so these are the first ids (paper 3.2).

    Raises:
      ConfigError: there are fewer pieces than rows to fill.
    """
    population = min(population, embedding.shape[0])
    if length > population:
        raise ConfigError(
            f"a prompt of {length} rows cannot be sampled from {population} vocabulary pieces "
            "without replacement. Lower PROMPT_LENGTH, or set PROMPT_INIT = 'random_uniform'."
        )
    rows = jax.random.choice(key, population, (length,), replace=False)
    return jnp.asarray(embedding)[rows].astype(jnp.float32)


def class_labels(
    key: PRNGKeyArray,
    embedding: Float[Array, "V D"],
    length: int,
    label_ids: Sequence[Sequence[int]],
    population: int = 5000,
) -> Float[Array, "P D"]:
    """One row per label, the mean of its pieces' embeddings; the rest is sampled vocabulary.

    Labels beyond `length` are left out, in order (a prompt of one row begins as the first label).
    `label_ids` hold no end-of-sequence (paper 3.2).

    Raises:
      ConfigError: a label has no pieces.
    """
    for position, ids in enumerate(label_ids):
        if len(ids) == 0:
            raise ConfigError(f"class label number {position} is empty: it has no pieces.")
    table = jnp.asarray(embedding).astype(jnp.float32)
    rows = [table[jnp.asarray(ids)].mean(axis=0) for ids in label_ids[:length]]
    rest = sampled_vocab(key, embedding, length - len(rows), population)
    return jnp.concatenate([jnp.stack(rows), rest]) if rows else rest


def from_text(
    key: PRNGKeyArray,
    embedding: Float[Array, "V D"],
    length: int,
    ids: Sequence[int],
    population: int = 5000,
) -> Float[Array, "P D"]:
    """One row per piece of a text, in order; rows beyond the text are sampled vocabulary."""
    return class_labels(key, embedding, length, [[i] for i in ids], population)


def resolve_init(config: PromptConfig, task_labels: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Which initialisation `config` means for a task, and the label words it uses.

    'auto' is class labels where there are any (the configuration's own first, then the task's),
    else sampled vocabulary.

    Raises:
      ConfigError: class labels are asked for, but neither the configuration nor the task has any.
    """
    labels = tuple(config.class_labels) or tuple(task_labels)
    if config.init == "auto":
        return ("class_labels", labels) if labels else ("sampled_vocab", ())
    if config.init == "class_labels" and not labels:
        raise ConfigError(
            "PROMPT_INIT = 'class_labels': the task has no labels. Expected words in CLASS_LABELS. "
            "Set it, for example --gin.CLASS_LABELS=\"['yes', 'no']\", or another PROMPT_INIT."
        )
    return config.init, labels if config.init == "class_labels" else ()


def init_prompt(
    config: PromptConfig,
    key: PRNGKeyArray,
    embedding: Float[Array, "V D"],
    *,
    encode: Encode,
    task_labels: Sequence[str] = (),
) -> tuple[Float[np.ndarray, "P D"], str]:
    """The first prompt, float32, and a sentence on how it was made.

    A prompt from a file is not made here: `prompts.prompt_file.load_prompt` reads it.
    """
    init, labels = resolve_init(config, task_labels)
    length, population = config.length, min(config.population, embedding.shape[0])
    if init == "random_uniform":
        prompt = random_uniform(key, (length, embedding.shape[1]), config.scale)
        description = f"uniform random in [-{config.scale}, {config.scale}]"
    elif init == "sampled_vocab":
        prompt = sampled_vocab(key, embedding, length, population)
        description = f"{length} of the {population} most common pieces"
    elif init == "class_labels":
        prompt = class_labels(key, embedding, length, [encode(w) for w in labels], population)
        words, others = ", ".join(map(repr, labels[:length])), len(labels) - length
        rest = ", then sampled vocabulary"
        if others > 0:
            rest = f"; of the {len(labels)} labels {others} begin no row (PROMPT_LENGTH = {length})"
        description = f"class labels {words}{rest}"
    else:
        assert init == "text", init
        ids = list(encode(config.text))
        prompt = from_text(key, embedding, length, ids, population)
        description = f"the first {min(len(ids), length)} of {len(ids)} pieces of PROMPT_TEXT"
        description += ", then sampled vocabulary" if len(ids) < length else ""
    description += " (no initialisation was asked for)" if config.init == "auto" else ""
    return np.asarray(prompt, np.float32), description
