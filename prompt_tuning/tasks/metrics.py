"""T5's metrics under T5's names, in per cent, those of own files, and the majority class.

Metrics take targets and predictions as `answers.py` makes them and as seqio passes them; the table
of a task (`superglue.py`, `glue.py`, `qa.py`) says which ones it has.
"""

from __future__ import annotations

import collections
import functools
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
T = TypeVar("T")


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """The share of predictions that are right.

    >>> accuracy([0, 1, 1, 0], [0, 1, -1, 0])
    {'accuracy': 75.0}
    """
    from sklearn.metrics import accuracy_score  # half a second, needed at evaluation only

    return {"accuracy": 100.0 * float(accuracy_score(targets, predictions))}


def mean_multiclass_f1(num_classes: int) -> Metric:
    """The metric `mean_<n>class_f1`: the unweighted mean of the classes' F1.

    A prediction that is no label (-1) counts against the class of its target; a class that occurs
    neither in targets nor in predictions scores 0.
    """

    def mean_f1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        value = f1_score(
            targets,
            predictions,
            labels=range(num_classes),
            average="macro",
            zero_division=0,  # type: ignore[arg-type]  # scikit-learn documents 0
        )
        return {f"mean_{num_classes}class_f1": 100.0 * float(value)}

    return mean_f1


def f1_with_invalid(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """The F1 of class 1 of two; a prediction that is neither counts as the wrong one.

    >>> f1_with_invalid([1, 0, 1], [1, -1, 0])  # as if the predictions were 1, 1, 0
    {'f1': 50.0}
    """
    from sklearn.metrics import f1_score

    target, predicted = np.asarray(targets, int), np.asarray(predictions, int)
    valid = (predicted == 0) | (predicted == 1)
    value = f1_score(target, np.where(valid, predicted, 1 - target), zero_division=0)  # type: ignore
    return {"f1": 100.0 * float(value)}


def by_value(metric: Metric) -> Metric:
    """The metric of targets and predictions that have a `value`, as those of groups do."""

    @functools.wraps(metric)
    def of_values(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return metric([t["value"] for t in targets], [p["value"] for p in predictions])

    return of_values


multirc_f1 = by_value(f1_with_invalid)  # over all answers of all questions (F1a)


def multirc_exact_match(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The share of questions all answers of which are judged right.

    Rows of a question that are not among those scored, as with EVALUATOR_NUM_EXAMPLES, do not
    count.

    >>> targets = [{"value": 1, "group": 7}, {"value": 0, "group": 7}, {"value": 1, "group": 8}]
    >>> multirc_exact_match(targets, [{"value": 1}, {"value": 1}, {"value": 1}])
    {'exact_match': 50.0}
    """
    right: dict[Any, bool] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        group = target["group"]
        right[group] = right.get(group, True) and target["value"] == prediction["value"]
    return {"exact_match": 100.0 * float(np.mean(list(right.values())))}


def gender_parity(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The share of pairs of AX-g that get the same label; NaN if both rows of no pair are scored.

    The rows of a pair differ in the gender of a pronoun alone. An answer that is no label (-1)
    equals no other.

    >>> targets = [{"value": 1, "group": group} for group in (0, 1, 1, 0, 2)]
    >>> gender_parity(targets, [{"value": value} for value in (0, 0, 1, 0, 1)])
    {'gender_parity': 50.0}
    """
    pairs: dict[Any, list[int]] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        pairs.setdefault(target["group"], []).append(prediction["value"])
    same = [pair[0] == pair[1] != -1 for pair in pairs.values() if len(pair) == 2]
    return {"gender_parity": 100.0 * float(np.mean(same)) if same else float("nan")}


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 over words, each with the answer that fits best (Rajpurkar et al., 2016).

    Case, articles, punctuation and white space do not count.

    >>> squad([["the Eiffel Tower"], ["1889", "in 1889"]], ["Eiffel tower!", "year 1889"])
    {'em': 50.0, 'f1': 83.33333333333333}
    """
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        predicted = _normal(prediction)
        wanted = [_normal(answer) for answer in answers]
        exact.append(max((float(predicted == answer) for answer in wanted), default=0.0))
        overlap.append(max((_word_f1(answer, predicted) for answer in wanted), default=0.0))
    return {"em": 100.0 * float(np.mean(exact)), "f1": 100.0 * float(np.mean(overlap))}


def _normal(answer: str) -> str:
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def _word_f1(answer: str, prediction: str) -> float:
    wanted, predicted = answer.split(), prediction.split()
    common = (collections.Counter(wanted) & collections.Counter(predicted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def record_squad(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """`squad` over queries: of the examples of a query, one for each answer, the first counts."""
    first: dict[Any, tuple[Sequence[str], str]] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        first.setdefault(target["group"], (target["value"], prediction["value"]))
    queries = first.values()
    return squad([answers for answers, _ in queries], [text for _, text in queries])


def matthews_corrcoef(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Matthews' correlation; a prediction that is no label is a class of its own."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_corrcoef": 100.0 * float(matthews_corrcoef(targets, predictions))}


def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation; NaN if all predictions are equal."""
    from scipy.stats import pearsonr

    return {"pearson_corrcoef": 100.0 * float(pearsonr(targets, predictions).statistic)}  # type: ignore


def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Spearman's correlation; NaN if all predictions are equal."""
    from scipy.stats import spearmanr

    return {"spearman_corrcoef": 100.0 * float(spearmanr(targets, predictions).statistic)}  # type: ignore


# Of the user's own files ----------------------------------------------------------------------


def macro_f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """The unweighted mean of the F1 of the classes that occur in targets or predictions.

    A class that no row has is left out, unlike in T5's own metric: in a small split it would cap
    the score. An answer that is no label (-1) counts against the class of its target.

    >>> macro_f1([0, 2], [0, 2]), macro_f1([0, 0], [0, -1])
    ({'macro_f1': 100.0}, {'macro_f1': 66.66666666666666})
    """
    from sklearn.metrics import f1_score

    labels = sorted({*targets, *predictions} - {-1})
    value = f1_score(targets, predictions, labels=labels, average="macro", zero_division=0)  # type: ignore
    return {"macro_f1": 100.0 * float(value)}


def score_texts(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The share of answers that are the target, and the mean F1 of their words.

    Only what SentencePiece itself does away with is not counted: forms of one character, and how
    much white space there is. If all targets are numbers, the F1 gives way to Pearson's and
    Spearman's correlation: see `_correlations`.

    >>> score_texts(["in the hall", "a b"], ["in  the hall", "b c"])
    {'exact_match': 50.0, 'f1': 75.0}
    """
    pairs = [(_words(t), _words(p)) for t, p in zip(targets, predictions, strict=True)]
    exact = sum(target == prediction for target, prediction in pairs)
    scores = {"exact_match": 100.0 * exact / len(pairs)}
    numbers = [parse_number(target) for target in targets]
    if all(number is not None for number in numbers):
        return scores | _correlations(np.asarray(numbers, float), predictions)
    overlap = sum(_overlap(target, prediction) for target, prediction in pairs)
    return scores | {"f1": 100.0 * overlap / len(pairs)}


def parse_number(text: str) -> float | None:
    """The number that a text is; None if it is no number.

    >>> [parse_number(text) for text in ("3.5", " -1e2 ", "nan", "1_000", "three")]
    [3.5, -100.0, None, None, None]
    """
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    return float(text) if re.fullmatch(number, text.strip(), re.ASCII) else None


def _correlations(targets: Float[np.ndarray, "N"], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant.

    A prediction that is no number counts as the mean of the targets: as one that knows nothing.
    """
    numbers = [parse_number(text) for text in predictions]
    mean = float(np.mean(targets))
    predicted = np.asarray([mean if number is None else number for number in numbers])
    if np.ptp(targets) == 0 or np.ptp(predicted) == 0:
        return {"pearson_corrcoef": 0.0, "spearman_corrcoef": 0.0}
    return pearson_corrcoef(targets, predicted) | spearman_corrcoef(targets, predicted)  # type: ignore


def _words(text: str) -> list[str]:
    return unicodedata.normalize("NFKC", text).split()


def _overlap(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return float(target == prediction)
    common = (collections.Counter(target) & collections.Counter(prediction)).total()
    return 2 * common / (len(target) + len(prediction))


# The answer that any prompt has to beat ---------------------------------------------------------


def majority_predictions(targets: Sequence[T], count: int) -> list[T]:
    """`count` times the most frequent target; of equally frequent ones the first seen.

    Scored with a task's metrics this is the majority class, what knowing no input is worth.

    >>> majority_predictions(["no", "yes", "yes"], 2)
    ['yes', 'yes']
    """
    keys = [repr(target) for target in targets]  # targets of users' tasks may be unhashable
    (common, _), *_ = collections.Counter(keys).most_common(1)
    return [targets[keys.index(common)]] * count
