"""What a task is: one row of a table, and the conversion of labelled rows that most tasks share.

First station of the data: a raw row, in TFDS' form, becomes examples with `inputs` and `targets` in
T5's format. The tables are `superglue.py`, `glue.py` and `qa.py`, with the conversions of the odd
tasks; `tasks/graph.py` runs the same conversions in tf.data.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks.answers import Postprocess
from prompt_tuning.tasks.metrics import Metric

Row = Mapping[str, Any]
Example = dict[str, Any]
UNLABELLED = "<unk>"  # T5's target of a row that has no answer, as those of the test splits


def labelled(spec: TaskSpec, row: Row, word: str) -> list[Example]:
    """The row as one example whose target is the word of its label.

    Raises:
      ConfigError: a feature is missing or not text, or the label is none of the task's.
    """
    pieces = [piece for piece in (word,) if piece]
    for feature, column in zip(spec.features, spec.columns or spec.features, strict=True):
        pieces += [f"{feature}:", text_field(spec, row, column)]
    index = label_index(spec, row.get("label", -1))
    return [
        {
            **kept_index(row),
            "inputs": clean(" ".join(pieces), spec.clean),
            "targets": UNLABELLED if index == -1 else spec.labels[index],
        }
    ]


Convert = Callable[["TaskSpec", Row, str], list[Example]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What distinguishes one task from another."""

    name: str  # in seqio; `taskless_` in front of it is the form without the word
    source: str  # the TFDS dataset with its version
    metrics: tuple[Metric, ...] = ()
    word: str = ""  # with which T5 begins the inputs
    features: tuple[str, ...] = ()  # names in the text, in the order in which T5 joins them
    columns: tuple[str, ...] = ()  # their names in TFDS, where those differ
    clean: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), in the syntax of re and RE2
    labels: tuple[str, ...] = ()  # words of the classes, in the order of TFDS' indices
    words: tuple[str, ...] = ()  # what the model answers with, where those are other words
    answers: str = ""  # the key of an example that holds the answers it may choose from
    splits: tuple[str, ...] | Mapping[str, str] | None = None  # None: those of the source
    rows: float = 0.0  # of the training split: the task's weight in a proportional mixture
    convert: Convert = labelled
    postprocess: Postprocess | None = None

    @property
    def config(self) -> str:
        """The configuration of the TFDS dataset, "" where it has none: `cb`, `wsc.fixed`."""
        return self.source.split(":")[0].partition("/")[2]


def to_examples(spec: TaskSpec, row: Row, *, task_word: bool = True) -> list[Example]:
    """The examples of a row in TFDS' form: one, several, or none.

    Without the task word it is the form that the paper trains on: the prompt says which task it
    is. Besides the texts an example holds what T5 keeps of the row for its metrics.

    Raises:
      ConfigError: a feature is missing or of another type, or the label is none of the task's.
    """
    return spec.convert(spec, row, spec.word if task_word else "")


def text_field(spec: TaskSpec, row: Row, name: str) -> str:
    """A field of a row that has to be text.

    Raises:
      ConfigError: it is not there, or it is something else.
    """
    if not isinstance(row.get(name), str):
        raise ConfigError(
            f"a row of {spec.name} needs the text field {name!r}, found {row.get(name)!r}; the row "
            f"has the fields {sorted(row)}."
        )
    return row[name]


def text_list(spec: TaskSpec, row: Row, name: str) -> list[str]:
    """A field of a row that has to be a list of texts.

    Raises:
      ConfigError: it is not there, or it is something else.
    """
    values = row.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(
            f"a row of {spec.name} needs the list of texts {name!r}, found {values!r}; the row has "
            f"the fields {sorted(row)}."
        )
    return values


def kept_index(row: Row) -> Example:
    """The `idx` of a row as T5 keeps it: `idx`, or `idx/question` and so on of a nested one."""
    index = row.get("idx")
    if isinstance(index, Mapping):
        return {f"idx/{key}": value for key, value in index.items()}
    return {} if index is None else {"idx": index}


def clean(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    r"""The text after all replacements, one after the other.

    >>> clean("a<br>b", ((r"<br>", " "),))
    'a b'
    """
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def label_index(spec: TaskSpec, label: Any) -> int:
    """The index of a label: TFDS' index (-1 for none), its word, or a boolean for False/True.

    Raises:
      ConfigError: the label is none of the task's.
    """
    if isinstance(label, bool) and spec.labels == ("False", "True"):
        return int(label)
    if isinstance(label, str) and label in spec.labels:
        return spec.labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and -1 <= label < len(spec.labels):
        return label
    raise ConfigError(
        f"the label of a {spec.name} row must be one of {', '.join(spec.labels)}, its index, or -1 "
        f"for none; found {label!r}."
    )
