"""SuperGLUE rows as text, in T5's format: one table row a task, no TensorFlow.

First station of the data: a raw row becomes `{"inputs": ..., "targets": ...}`. `tasks.py` makes
seqio tasks of the table and runs the same parts in tf.data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.text.metrics import Metric, accuracy, mean_multiclass_f1

UNLABELLED = "<unk>"  # T5's target of a row whose label is -1, that is, of the test splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What distinguishes one SuperGLUE task from another."""

    name: str  # T5's task word, and the configuration in TFDS
    folder: str  # in the official JSONL release
    features: tuple[str, ...]  # in the order in which T5 joins them
    labels: tuple[str, ...]  # in the order of TFDS' indices
    num_train: int  # rows of the training split (Lester et al., table 7)
    metrics: tuple[Metric, ...]


BOOLQ = TaskSpec(
    name="boolq",
    folder="BoolQ",
    features=("passage", "question"),
    labels=("False", "True"),
    num_train=9427,
    metrics=(accuracy,),
)
CB = TaskSpec(
    name="cb",
    folder="CB",
    features=("hypothesis", "premise"),
    labels=("entailment", "contradiction", "neutral"),
    num_train=250,
    metrics=(mean_multiclass_f1(3), accuracy),
)
RTE = TaskSpec(
    name="rte",
    folder="RTE",
    features=("hypothesis", "premise"),
    labels=("entailment", "not_entailment"),
    num_train=2490,
    metrics=(accuracy,),
)
TASKS = MappingProxyType({spec.name: spec for spec in (BOOLQ, CB, RTE)})


def input_parts(spec: TaskSpec, *, task_word: bool) -> tuple[tuple[str, str], ...]:
    """Pairs (literal text, feature whose text follows it); joined they are the model's input.

    The only place that knows the format. Without the task word it is the form that the paper
    trains on: the prompt says which task it is.

    >>> input_parts(CB, task_word=True)
    (('cb hypothesis: ', 'hypothesis'), (' premise: ', 'premise'))
    """
    first = f"{spec.name} " if task_word else ""
    return tuple(
        (f"{first if i == 0 else ' '}{feature}: ", feature)
        for i, feature in enumerate(spec.features)
    )


def to_text(spec: TaskSpec, row: Mapping[str, Any], *, task_word: bool = True) -> dict[str, str]:
    """The row as `inputs` and `targets`.

    >>> row = {"hypothesis": "It rained.", "premise": "The street is wet.", "label": 0}
    >>> to_text(CB, row)["inputs"]
    'cb hypothesis: It rained. premise: The street is wet.'
    >>> to_text(CB, row, task_word=False)
    {'inputs': 'hypothesis: It rained. premise: The street is wet.', 'targets': 'entailment'}

    Raises:
      ConfigError: a feature is missing or not text, or the label is none of the task's.
    """
    for feature in spec.features:
        if not isinstance(row.get(feature), str):
            raise ConfigError(
                f"a row of {spec.name} needs the text field {feature!r}, found "
                f"{row.get(feature)!r}; the row has the fields {sorted(row)}."
            )
    parts = input_parts(spec, task_word=task_word)
    index = label_index(spec, row.get("label", -1))
    return {
        "inputs": "".join(literal + row[feature] for literal, feature in parts),
        "targets": UNLABELLED if index == -1 else spec.labels[index],
    }


def label_index(spec: TaskSpec, label: Any) -> int:
    """The index of a label in TFDS' form (an index, -1 for none) or the JSONL's (word, boolean).

    Raises:
      ConfigError: the label is none of the task's.
    """
    words = ("False", "True")
    if isinstance(label, bool) and spec.labels == words:
        return int(label)
    if isinstance(label, str) and label in spec.labels:
        return spec.labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and -1 <= label < len(spec.labels):
        return label
    raise ConfigError(
        f"the label of a {spec.name} row must be one of {', '.join(spec.labels)}, its index, or -1 "
        f"for none; found {label!r}."
    )
