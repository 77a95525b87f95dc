"""Rows as Python values through a table's conversion, and its examples as Python values."""

from typing import Any

import tensorflow as tf

from prompt_tuning.tasks import spec as tasks
from prompt_tuning.tasks.spec import TaskSpec


def convert(spec: TaskSpec, *rows: dict, task_word: bool = True) -> list[dict]:
    """The examples of rows that have the same fields."""
    dataset = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature(rows[0]))
    examples = tasks.to_examples(dataset, spec, task_word=task_word)
    return [plain(example) for example in examples.as_numpy_iterator()]


def signature(value: Any) -> Any:
    """The TensorSpecs of a row: lists are of texts."""
    if isinstance(value, dict):
        return {key: signature(inner) for key, inner in value.items()}
    kind = {int: tf.int32, float: tf.float32}.get(type(value), tf.string)
    return tf.TensorSpec([None] if isinstance(value, list) else [], kind)


def plain(value: Any) -> Any:
    """What tf.data gives as texts, numbers and lists, without seqio's `_pretokenized`."""
    if isinstance(value, dict):
        texts = {k: v for k, v in value.items() if f"{k}_pretokenized" not in value}
        return {k.removesuffix("_pretokenized"): plain(v) for k, v in texts.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode()
    return plain(value.tolist()) if hasattr(value, "tolist") else value
