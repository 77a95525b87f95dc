"""T5's metrics under T5's names, in per cent, and the answer that any prompt has to beat.

Metrics take postprocessed targets and predictions, as seqio passes them; `superglue.py` says which
task has which.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
T = TypeVar("T")


def label_index(output: str, *, labels: Sequence[str], **_: Any) -> int:
    """The index of the label that the output is, to the letter; -1 where it is none.

    seqio calls it as a task's `postprocess_fn`, with the example and other words ignored here.

    >>> label_index("True", labels=("False", "True")), label_index("true", labels=("False", "True"))
    (1, -1)
    """
    return labels.index(output) if output in labels else -1


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


def majority_predictions(train_targets: Sequence[T], count: int) -> list[T]:
    """`count` times the most frequent training target; of equally frequent ones the first seen.

    Scored with a task's metrics this is the majority class, what knowing no input is worth.

    >>> majority_predictions(["no", "yes", "yes"], 2)
    ['yes', 'yes']
    """
    keys = [repr(target) for target in train_targets]  # targets of users' tasks may be unhashable
    (common, _), *_ = collections.Counter(keys).most_common(1)
    return [train_targets[keys.index(common)]] * count
