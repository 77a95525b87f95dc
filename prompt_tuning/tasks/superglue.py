"""The tasks of SuperGLUE and their mixtures: one table row a task.

Rows are those of TFDS, texts T5's to the letter. ReCoRD and WSC, which are no classifications in
T5's form, have conversions of their own here.
"""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from prompt_tuning.tasks import answers, metrics
from prompt_tuning.tasks.release import AFTER_PRONOUN, COMMITMENT, ENTAILMENT
from prompt_tuning.tasks.spec import (
    UNLABELLED,
    Example,
    Row,
    TaskSpec,
    clean,
    each_row,
    index_features,
    named_inputs,
)

BOOLEAN = ("False", "True")

# Where the passages of ReCoRD have a highlight, a sentence begins.
HIGHLIGHTS = ((r"([.?!\"'])\n@highlight\n", r"\1 "), (r"\n@highlight\n", ". "))


def record(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """One example for each answer, in every split; the entities stay, for ranking."""
    return _record_queries(dataset, spec, word).unbatch()


@each_row
def _record_queries(spec: TaskSpec, row: Row, word: str) -> Example:
    """The examples of a query, stacked."""
    del spec
    passage = clean(row["passage"], HIGHLIGHTS)
    entities = tf.strings.reduce_join(row["entities"], separator=", ")
    texts = row["answers"]
    targets = tf.cond(tf.size(texts) > 0, lambda: texts, lambda: tf.constant([UNLABELLED]))
    shared = {
        **index_features(row),
        **named_inputs(word, {"query": row["query"], "entities": entities, "passage": passage}),
        "answers": texts,
        "entities": row["entities"],
    }
    count = tf.size(targets)
    copies = {
        key: tf.broadcast_to(value, tf.concat([[count], tf.shape(value)], axis=0))
        for key, value in shared.items()
    }
    return {**copies, "targets": targets}


@each_row
def wsc(spec: TaskSpec, row: Row, word: str) -> Example:
    """The text with the pronoun between asterisks; the target is the referent that is offered.

    It is the target whether or not it is the right one, which `label` says.
    """
    del spec
    marked = mark_pronoun(row["text"], row["span2_index"], row["span2_text"])
    return {
        **index_features(row),
        **named_inputs(word, {"": marked}),
        "targets": row["span1_text"],
        "label": row["label"],
    }


def wsc_right(dataset: tf.data.Dataset, spec: TaskSpec, word: str) -> tf.data.Dataset:
    """`wsc`, and nothing of a row whose referent is not the right one: it is no target."""
    return wsc(dataset.filter(lambda row: row["label"] == 1), spec, word)


def mark_pronoun(
    text: tf.Tensor | str, index: tf.Tensor | int, pronoun: tf.Tensor | str
) -> tf.Tensor:
    """The text with asterisks around the pronoun, the word number `index` between single spaces.

    In a few rows of WSC punctuation is stuck to the pronoun, or the number is one off: then it is
    the pronoun nearest to the number, set apart from its punctuation, as T5 has these rows.

    >>> mark_pronoun("Tom left when he could.", 3, "he").numpy()
    b'Tom left when *he* could.'
    >>> mark_pronoun("It is good for him, Tom said. ", 4, "him").numpy()
    b'It is good for *him* , Tom said.'

    Raises:
      tf.errors.InvalidArgumentError: the pronoun is not in the text.
    """
    words = tf.strings.split(text, sep=" ")
    lengths = tf.strings.length(words)
    rests = tf.strings.substr(words, tf.minimum(tf.strings.length(pronoun), lengths), lengths)
    begins = words == tf.strings.join([pronoun, rests])
    fits = begins & tf.strings.regex_full_match(rests, AFTER_PRONOUN)
    places = tf.where(fits)[:, 0]
    message = ["the pronoun (span2_text) is not a word of the text: ", pronoun, text]
    with tf.control_dependencies([tf.debugging.Assert(tf.size(places) > 0, message)]):
        place = places[tf.argmin(tf.abs(places - tf.cast(index, tf.int64)))]
    rest = rests[place]
    after = words[place + 1 :]
    after = tf.cond(rest == "", lambda: after, lambda: tf.concat([[rest], after], axis=0))
    before, behind = (
        tf.strings.reduce_join(part, separator=" ") for part in (words[:place], after)
    )
    # T5 marks the place with a free-standing X, and every X that stands free is marked with it.
    blank = tf.strings.join([before, "X", behind], separator=" ")
    rewrite = tf.strings.join([" *", tf.strings.regex_replace(pronoun, r"\\", r"\\\\"), "* "])
    marked = tf.strings.regex_replace(blank, " X ", rewrite)
    repaired = (rest != "") | (place != tf.cast(index, tf.int64))
    marked = tf.cond(repaired, lambda: tf.strings.regex_replace(marked, r" +$", ""), lambda: marked)
    return tf.cond(place == 0, lambda: tf.strings.substr(marked, 1, 2**31 - 1), lambda: marked)


@each_row
def dpr(spec: TaskSpec, row: Row, word: str) -> Example:
    """A row of Definite Pronoun Resolution in the form of WSC; the candidates stay.

    The first occurrence of the pronoun is the one to resolve.
    """
    del spec
    # RE2 takes letters beyond ASCII as they are, and a backslash before anything else.
    special = r"([^0-9A-Za-z_\x{80}-\x{10FFFF}])"
    literal = tf.strings.regex_replace(row["pronoun"], special, r"\\\1")
    pattern = tf.strings.join([" (", literal, r")( |\.|,)"])
    marked = tf.strings.regex_replace(row["sentence"], pattern, r" *\1*\2", replace_global=False)
    targets = tf.concat([[UNLABELLED], row["candidates"]], axis=0)
    return {
        **named_inputs(word, {"": marked}),
        "targets": targets[row["label"] + 1],
        "candidates": row["candidates"],
    }


def _super_glue(config: str, **columns: Any) -> TaskSpec:
    """A row of the table, with what most tasks have in common."""
    labels = columns.get("labels", ())
    common = {
        "name": f"super_glue_{config}_v102",
        "source": f"super_glue/{config}:1.0.2",
        "word": config,
        "metrics": (metrics.accuracy,),
        "postprocess": answers.to_label(*labels),
    }
    return TaskSpec(**{**common, **columns})


BOOLQ = _super_glue("boolq", features=("passage", "question"), labels=BOOLEAN, rows=9_427.0)
CB = _super_glue(
    "cb",
    features=("hypothesis", "premise"),
    labels=COMMITMENT,
    rows=250.0,
    metrics=(metrics.mean_multiclass_f1(3), metrics.accuracy),
)
COPA = _super_glue(
    "copa",
    features=("choice1", "choice2", "premise", "question"),
    labels=("choice1", "choice2"),
    rows=400.0,
)
MULTIRC = _super_glue(
    "multirc",
    features=("question", "answer", "paragraph"),
    clean=((r"<br>", " "), (r"<(/)?b>", "")),
    labels=BOOLEAN,
    rows=27_243.0,
    postprocess=answers.multirc_label,
    metrics=(metrics.multirc_f1, metrics.multirc_exact_match),
)
RECORD = _super_glue(
    "record",
    rows=138_854.0,  # one for each answer; 100,730 queries
    convert=record,
    answers="entities",
    postprocess=answers.record_answer,
    metrics=(metrics.record_squad,),
)
RTE = _super_glue("rte", features=("hypothesis", "premise"), labels=ENTAILMENT, rows=2_490.0)
WIC = _super_glue("wic", features=("sentence1", "sentence2", "word"), labels=BOOLEAN, rows=5_428.0)
AXB = _super_glue(
    "axb",
    word="rte",
    features=("hypothesis", "premise"),
    columns=("sentence2", "sentence1"),
    labels=ENTAILMENT,
    splits=("test",),  # with labels
    metrics=(metrics.matthews_corrcoef,),
)
AXG = _super_glue(
    "axg",
    word="rte",
    features=("hypothesis", "premise"),
    labels=ENTAILMENT,
    splits=("test",),  # with labels
    postprocess=functools.partial(answers.pair_label, labels=ENTAILMENT),
    metrics=(metrics.gender_parity, metrics.by_value(metrics.accuracy)),
)
WSC_TRAIN = _super_glue(
    "wsc.fixed",
    name="super_glue_wsc_v102_simple_train",
    word="wsc:",
    convert=wsc_right,
    splits=("train",),
    rows=259.0,  # those of 554 that offer the right referent
    postprocess=None,
    metrics=(),
)
WSC_EVAL = _super_glue(
    "wsc.fixed",
    name="super_glue_wsc_v102_simple_eval",
    word="wsc:",
    convert=wsc,
    splits=("validation", "test"),
    postprocess=answers.names_referent,
)
DPR = TaskSpec(
    name="dpr_v001_simple",
    source="definite_pronoun_resolution:1.1.0",
    word="wsc:",
    convert=dpr,
    answers="candidates",
    rows=1_322.0,
    metrics=(metrics.accuracy,),
)

WSC = (WSC_TRAIN, WSC_EVAL)
SUPER_GLUE = (DPR, *WSC, BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, WIC, AXB, AXG)
TASKS = MappingProxyType({spec.name: spec for spec in SUPER_GLUE})

# Each task in proportion to its training rows; those with none are there to be evaluated.
PROPORTIONAL = tuple((spec.name, spec.rows) for spec in SUPER_GLUE)
MIXTURES = MappingProxyType(
    {
        "super_glue_v102_proportional": PROPORTIONAL,
        # For who has the archives of SuperGLUE and nothing else.
        "super_glue_without_dpr_v102_proportional": PROPORTIONAL[1:],
        "super_glue_wsc_and_dev_v102_simple": tuple((spec.name, 1.0) for spec in WSC),
    }
)
