"""What a task is: one row of a table, and the conversion of labelled rows that most tasks share.

First station of the data: raw rows, in TFDS' form, become examples with `inputs` and `targets` in
T5's format. The tables are `superglue.py`, `glue.py` and `qa.py`, with the conversions of the odd
tasks.

Conversions are made of TensorFlow's own operations: upstream T5X saves where it stands in a
dataset, which TensorFlow refuses where a dataset calls back into Python.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from prompt_tuning.tasks.answers import Postprocess
from prompt_tuning.tasks.metrics import Metric

Row = Mapping[str, Any]  # of tensors, as TFDS gives it
Example = dict[str, Any]  # of tensors
Convert = Callable[[tf.data.Dataset, "TaskSpec", str], tf.data.Dataset]
FIELDS = ("input_fields", "input_spans")  # features of an example: where its fields are
UNLABELLED = "<unk>"  # T5's target of a row that has no answer, as those of the test splits


def each_row(convert: Callable[[TaskSpec, Row, str], Example]) -> Convert:
    """The conversion of a dataset every row of which becomes one example."""

    @functools.wraps(convert)
    def convert_all(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
        return dataset.map(
            lambda row: convert(spec, row, word), num_parallel_calls=tf.data.AUTOTUNE
        )

    return convert_all


@each_row
def labelled(spec: TaskSpec, row: Row, word: str) -> Example:
    """The texts of a row behind their names; the target is the word of its label."""
    words = tf.constant([UNLABELLED, *spec.labels])  # label -1 is the first one
    return {
        **index_features(row),
        **named_inputs(word, named_texts(spec, row)),
        "targets": tf.gather(words, row["label"] + 1),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What distinguishes one task from another."""

    name: str  # in seqio; `taskless_` in front of it is the form without the word
    source: str  # the TFDS dataset with its version
    metrics: tuple[Metric, ...] = ()
    word: str = ""  # with which T5 begins the inputs
    features: tuple[str, ...] = ()  # names in the text, in the order in which T5 joins them
    columns: tuple[str, ...] = ()  # their names in TFDS, where those differ
    clean: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), in RE2's syntax
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


def to_examples(
    dataset: tf.data.Dataset, spec: TaskSpec, *, task_word: bool = True, with_fields: bool = False
) -> tf.data.Dataset:
    """The examples of rows in TFDS' form; a row may become several, or none.

    Without the task word it is the form that the paper trains on: the prompt says which task it
    is. Besides the texts an example holds what T5 keeps of the row for its metrics and, if asked
    for, FIELDS.
    """
    examples = spec.convert(dataset, spec, spec.word if task_word else "")
    if with_fields:
        return examples
    return examples.map(lambda row: {key: row[key] for key in row if key not in FIELDS})


def named_texts(spec: TaskSpec, row: Row) -> dict[str, Any]:
    """The texts of a row by their names, in T5's order."""
    columns = spec.columns or spec.features
    pairs = zip(spec.features, columns, strict=True)
    return {feature: clean(row[column], spec.clean) for feature, column in pairs}


def named_inputs(word: str, texts: Mapping[str, Any]) -> Example:
    """The inputs of texts, each behind its name, and where in them each is.

    T5 has no name for the only text of a task; here it is "".
    """
    pieces, spans, end = [], [], len(f"{word} ") if word else 0
    for name, text in texts.items():
        label = f"{name}: " if name else ""
        start = end + len(label)
        end = start + tf.strings.length(text)
        spans += [start, end]
        pieces += [label[:-1], text] if name else [text]
        end += 1  # a space
    return {
        "inputs": join(word, *pieces),
        "input_fields": tf.constant([name or "text" for name in texts]),
        "input_spans": tf.stack(spans),  # start and end of each, in bytes
    }


def join(*pieces: Any) -> tf.Tensor:
    """The pieces with a space between them; a task without its word begins with the next piece."""
    return tf.strings.join(pieces if pieces[0] != "" else pieces[1:], separator=" ")


def index_features(row: Row) -> Example:
    """The `idx` of a row as T5 keeps it: `idx`, or `idx/question` and so on of a nested one."""
    index = row.get("idx")
    if isinstance(index, Mapping):
        return {f"idx/{key}": value for key, value in index.items()}
    return {} if index is None else {"idx": index}


def clean(text: tf.Tensor, rules: Sequence[tuple[str, str]]) -> tf.Tensor:
    r"""The text after all replacements, one after the other.

    >>> clean(tf.constant("a<br>b"), ((r"<br>", " "),)).numpy()
    b'a b'
    """
    for pattern, replacement in rules:
        text = tf.strings.regex_replace(text, pattern, replacement)
    return text
