"""The conversions of `text/` on rows of TFDS in graph mode, one function for each.

In TensorFlow's own operations, not in a call back to Python: 100,000 rows of ReCoRD take seconds,
and T5X can save where it stands in a dataset. `tasks.py` puts them first among the preprocessors;
tests hold every one equal to its pure counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from prompt_tuning.tasks import glue, qa, superglue
from prompt_tuning.tasks import spec as text
from prompt_tuning.tasks.spec import TaskSpec

Row = Mapping[str, Any]  # of tensors


def to_examples(dataset: tf.data.Dataset, spec: TaskSpec, task_word: bool) -> tf.data.Dataset:
    """`text.spec.to_examples` on all rows of a dataset."""
    return IN_GRAPH[spec.convert](dataset, spec, spec.word if task_word else "")


def labelled(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.spec.labelled`."""
    words = tf.constant([text.UNLABELLED, *spec.labels])  # label -1 is the first one

    def convert(row: Row) -> dict[str, Any]:
        inputs = _clean(tf.strings.join(_pieces(row, spec, word), " "), spec.clean)
        return {
            **text.kept_index(row),
            "inputs": inputs,
            "targets": tf.gather(words, row["label"] + 1),
        }

    return _map(dataset, convert)


def record(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.superglue.record`."""
    del spec

    def convert(row: Row) -> dict[str, Any]:
        passage = _clean(row["passage"], superglue.HIGHLIGHTS)
        entities = tf.strings.reduce_join(row["entities"], separator=", ")
        pieces = ["query:", row["query"], "entities:", entities, "passage:", passage]
        found = row["answers"]
        targets = tf.cond(tf.size(found) > 0, lambda: found, lambda: tf.constant([text.UNLABELLED]))
        shared = {
            **text.kept_index(row),
            "inputs": tf.strings.join([word, *pieces] if word else pieces, separator=" "),
            "answers": found,
            "entities": row["entities"],
        }
        count = tf.size(targets)
        copies = {
            key: tf.broadcast_to(value, tf.concat([[count], tf.shape(value)], axis=0))
            for key, value in shared.items()
        }
        return {**copies, "targets": targets}

    return _map(dataset, convert).unbatch()


def wsc(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.superglue.wsc`."""
    del spec

    def convert(row: Row) -> dict[str, Any]:
        marked = _mark_pronoun(row["text"], row["span2_index"], row["span2_text"])
        return {
            **text.kept_index(row),
            "inputs": tf.strings.join([word, marked], separator=" ") if word else marked,
            "targets": row["span1_text"],
            "label": row["label"],
        }

    return _map(dataset, convert)


def wsc_right(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.superglue.wsc_right`."""
    return wsc(dataset.filter(lambda row: row["label"] == 1), spec, word)


def _mark_pronoun(sentence: tf.Tensor, index: tf.Tensor, pronoun: tf.Tensor) -> tf.Tensor:
    words = tf.strings.split(sentence, sep=" ")
    lengths = tf.strings.length(words)
    rests = tf.strings.substr(words, tf.minimum(tf.strings.length(pronoun), lengths), lengths)
    begins = words == tf.strings.join([pronoun, rests])
    fits = begins & tf.strings.regex_full_match(rests, superglue.AFTER_PRONOUN)
    places = tf.where(fits)[:, 0]
    message = ["the pronoun (span2_text) is not a word of the text: ", pronoun, sentence]
    with tf.control_dependencies([tf.debugging.Assert(tf.size(places) > 0, message)]):
        place = places[tf.argmin(tf.abs(places - tf.cast(index, tf.int64)))]
    rest = rests[place]
    after = words[place + 1 :]
    after = tf.cond(rest == "", lambda: after, lambda: tf.concat([[rest], after], axis=0))
    before, behind = (
        tf.strings.reduce_join(part, separator=" ") for part in (words[:place], after)
    )
    blank = tf.strings.join([before, "X", behind], separator=" ")
    rewrite = tf.strings.join([" *", tf.strings.regex_replace(pronoun, r"\\", r"\\\\"), "* "])
    marked = tf.strings.regex_replace(blank, " X ", rewrite)
    repaired = (rest != "") | (place != tf.cast(index, tf.int64))
    marked = tf.cond(repaired, lambda: tf.strings.regex_replace(marked, r" +$", ""), lambda: marked)
    return tf.cond(place == 0, lambda: tf.strings.substr(marked, 1, 2**31 - 1), lambda: marked)


def dpr(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.superglue.dpr`."""
    del spec

    def convert(row: Row) -> dict[str, Any]:
        # RE2 takes letters beyond ASCII as they are, and a backslash before anything else.
        special = r"([^0-9A-Za-z_\x{80}-\x{10FFFF}])"
        literal = tf.strings.regex_replace(row["pronoun"], special, r"\\\1")
        pattern = tf.strings.join([" (", literal, r")( |\.|,)"])
        marked = tf.strings.regex_replace(
            row["sentence"], pattern, r" *\1*\2", replace_global=False
        )
        targets = tf.concat([[text.UNLABELLED], row["candidates"]], axis=0)
        return {
            "inputs": tf.strings.join([word, marked], separator=" ") if word else marked,
            "targets": targets[row["label"] + 1],
            "candidates": row["candidates"],
        }

    return _map(dataset, convert)


def similarity(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.glue.similarity`."""

    def convert(row: Row) -> dict[str, Any]:
        score = tf.as_string(tf.round(row["label"] * 5) / 5, precision=1)
        return {
            **text.kept_index(row),
            "inputs": tf.strings.join(_pieces(row, spec, word), " "),
            "targets": score,
        }

    return _map(dataset, convert)


def question(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`text.qa.question`."""
    del spec, word

    def convert(row: Row) -> dict[str, Any]:
        given = row["answers"]
        found = _clean(given["text"] if isinstance(given, Mapping) else given, qa.SPACED)
        asked, context = (_clean(row[name], qa.SPACED) for name in ("question", "context"))
        inputs = tf.strings.join(["question:", asked, "context:", context], " ")
        return {
            **qa.kept_id(row),
            "inputs": _clean(inputs, qa.COLLAPSED),
            "targets": tf.concat([found, [text.UNLABELLED]], axis=0)[0],
            "question": asked,
            "context": context,
            "answers": found,
        }

    return _map(dataset, convert)


def _pieces(row: Row, spec: TaskSpec, word: str) -> list[Any]:
    pieces = [word] if word else []
    for feature, column in zip(spec.features, spec.columns or spec.features, strict=True):
        pieces += [f"{feature}:", row[column]]
    return pieces


def _map(dataset: tf.data.Dataset, convert: Callable[[Row], Any]) -> tf.data.Dataset:
    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def _clean(value: tf.Tensor, rules: Sequence[tuple[str, str]]) -> tf.Tensor:
    for pattern, replacement in rules:
        value = tf.strings.regex_replace(value, pattern, replacement)
    return value


IN_GRAPH: Mapping[text.Convert, Callable[..., tf.data.Dataset]] = MappingProxyType(
    {
        text.labelled: labelled,
        superglue.record: record,
        superglue.wsc: wsc,
        superglue.wsc_right: wsc_right,
        superglue.dpr: dpr,
        glue.similarity: similarity,
        qa.question: question,
    }
)
