"""The metrics of a task of the user's own files, in per cent."""

from __future__ import annotations

import collections
import unicodedata
from collections.abc import Sequence
from typing import Any

from prompt_tuning.tasks.metrics import Metric, mean_multiclass_f1


def macro_f1(num_classes: int) -> Metric:
    """The unweighted mean of the classes' F1; an answer that is no label counts as a miss."""
    mean_f1 = mean_multiclass_f1(num_classes)

    def macro(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return {"macro_f1": next(iter(mean_f1(targets, predictions).values()))}

    return macro


def exact_match_and_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The share of answers that are the target, and the mean F1 of their words.

    Only what SentencePiece itself does away with is not counted: forms of one character, and how
    much white space there is.

    >>> exact_match_and_f1(["in the hall", "a b"], ["in  the hall", "b c"])
    {'exact_match': 50.0, 'f1': 75.0}
    """
    pairs = [(_words(t), _words(p)) for t, p in zip(targets, predictions, strict=True)]
    exact = sum(target == prediction for target, prediction in pairs)
    overlap = sum(_f1(target, prediction) for target, prediction in pairs)
    return {"exact_match": 100.0 * exact / len(pairs), "f1": 100.0 * overlap / len(pairs)}


def _words(text: str) -> list[str]:
    return unicodedata.normalize("NFKC", text).split()


def _f1(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return float(target == prediction)
    common = (collections.Counter(target) & collections.Counter(prediction)).total()
    return 2 * common / (len(target) + len(prediction))
