"""Texts that a vocabulary cannot write: a piece that it does not know stands for their characters.

The overview of a run, `t5x eval` and `t5x infer` describe such texts with this module.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from prompt_tuning.config import ConfigError
from prompt_tuning.vocabularies.vocabulary import Vocabulary

Ids = Sequence[int] | Int[np.ndarray, "_"]
SHOWN = 10  # characters in a message
CURE = (
    "Replace these characters, or take a model whose vocabulary has them (ByT5's has every byte, "
    "mT5's most scripts)."
)


def describe_lost(texts: Sequence[str], tokens: Sequence[Ids], vocabulary: Vocabulary) -> str:
    """How many texts lose characters, which characters, and how many texts become alike by it.

    "" if none does. `tokens` are those of the texts, possibly cut.
    """
    rows = [row for row, ids in enumerate(tokens) if vocabulary.unk_id in ids]
    if not rows:
        return ""
    different = len({texts[row] for row in rows})
    left = len({tuple(map(int, tokens[row])) for row in rows})
    alike = f"; {different} different texts become {left}" if left < different else ""
    return (
        f"{len(rows)} of {len(texts)} have characters that the vocabulary does not know"
        f"{_count([texts[row] for row in rows], vocabulary)}{alike}"
    )


def _count(texts: Sequence[str], vocabulary: Vocabulary) -> str:
    """The characters that the texts lose, such as ": '{' in 9 rows, '}' in 9 rows".

    "" if the texts do not show them, as of a task that keeps only tokens.
    """
    lost = (sorted({*"".join(vocabulary.lost(text))}) for text in texts)
    counts = collections.Counter(itertools.chain.from_iterable(lost))
    shown = [f"{character!r} in {n} rows" for character, n in counts.most_common(SHOWN)]
    more = len(counts) - len(shown)
    other = f" and {more} other characters" if more else ""
    return f": {', '.join(shown)}{other}" if shown else ""


def refuse_alike(
    texts: Sequence[str], tokens: Sequence[Ids], vocabulary: Vocabulary, what: str
) -> None:
    """Checks that different texts have different tokens in at least one case; `what` names them.

    Raises:
      ConfigError: all have the same tokens, because the vocabulary does not know their characters.
    """
    first = list(tokens[0])
    if vocabulary.unk_id not in first or any(list(ids) != first for ids in tokens):
        return
    if (different := len(set(texts))) == 1:
        return
    raise ConfigError(
        f"VOCABULARY: {what}, {different} different texts, become the same tokens, so the model "
        f"could not tell them apart: the vocabulary does not know their characters"
        f"{_count(texts, vocabulary)}. {CURE}"
    )
