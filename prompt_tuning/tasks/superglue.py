"""The tasks of SuperGLUE and their mixtures: one table row a task, no TensorFlow.

Rows are those of TFDS, texts T5's to the letter. ReCoRD and WSC, which are no classifications in
T5's form, have conversions of their own here.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import answers, metrics
from prompt_tuning.tasks.spec import (
    UNLABELLED,
    Example,
    Row,
    TaskSpec,
    clean,
    kept_index,
    text_field,
    text_list,
)

ENTAILMENT = ("entailment", "not_entailment")
BOOLEAN = ("False", "True")

# Where the passages of ReCoRD have a highlight, a sentence begins.
HIGHLIGHTS = ((r"([.?!\"'])\n@highlight\n", r"\1 "), (r"\n@highlight\n", ". "))
# What may follow a pronoun within its word: something that is no letter, and what comes after it.
AFTER_PRONOUN = "(?s)([^0-9A-Za-z\u00c0-\u1fff].*)?"


def record(spec: TaskSpec, row: Row, word: str) -> list[Example]:
    """One example for each answer, in every split; the entities stay, to choose from.

    Raises:
      ConfigError: a field is missing or of another type.
    """
    entities, found = text_list(spec, row, "entities"), text_list(spec, row, "answers")
    passage = clean(text_field(spec, row, "passage"), HIGHLIGHTS)
    query = f"query: {text_field(spec, row, 'query')}"
    pieces = [query, f"entities: {', '.join(entities)}", f"passage: {passage}"]
    shared = {
        **kept_index(row),
        "inputs": " ".join([word, *pieces] if word else pieces),
        "answers": found,
        "entities": entities,
    }
    return [{**shared, "targets": answer} for answer in found or [UNLABELLED]]


def wsc(spec: TaskSpec, row: Row, word: str) -> list[Example]:
    """The text with the pronoun between asterisks; the target is the referent that is offered.

    It is the target whether or not it is the right one, which `label` says.

    Raises:
      ConfigError: a field is missing or of another type, or the pronoun is not in the text.
    """
    text = text_field(spec, row, "text")
    marked = mark_pronoun(text, row["span2_index"], text_field(spec, row, "span2_text"))
    return [
        {
            **kept_index(row),
            "inputs": f"{word} {marked}" if word else marked,
            "targets": text_field(spec, row, "span1_text"),
            "label": int(row.get("label", 0)),
        }
    ]


def wsc_right(spec: TaskSpec, row: Row, word: str) -> list[Example]:
    """`wsc`, and nothing of a row whose referent is not the right one: it is no target."""
    return wsc(spec, row, word) if row.get("label") == 1 else []


def mark_pronoun(text: str, index: int, pronoun: str) -> str:
    """The text with asterisks around the pronoun, the word number `index` between single spaces.

    In a few rows of WSC punctuation is stuck to the pronoun, or the number is one off: then it is
    the pronoun nearest to the number, set apart from its punctuation, as T5 has these rows.

    >>> mark_pronoun("Tom left when he could.", 3, "he")
    'Tom left when *he* could.'
    >>> mark_pronoun("It is good for him, Tom said. ", 4, "him")
    'It is good for *him* , Tom said.'

    Raises:
      ConfigError: the pronoun is not in the text.
    """
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if _is_pronoun(word, pronoun)]
    if not places:
        raise ConfigError(f"the pronoun {pronoun!r} (span2_text) is not a word of {text!r}.")
    place = min(places, key=lambda i: abs(i - index))
    rest = words[place][len(pronoun) :]
    repaired = place != index or rest
    after = [rest, *words[place + 1 :]] if rest else words[place + 1 :]
    # T5 marks the place with a free-standing X, and every X that stands free is marked with it.
    blank = " ".join([" ".join(words[:place]), "X", " ".join(after)])
    marked = blank.replace(" X ", f" *{pronoun}* ")
    marked = marked.rstrip(" ") if repaired else marked
    return marked if place else marked[1:]


def _is_pronoun(word: str, pronoun: str) -> bool:
    rest = word[len(pronoun) :]
    return word.startswith(pronoun) and re.fullmatch(AFTER_PRONOUN, rest) is not None


def dpr(spec: TaskSpec, row: Row, word: str) -> list[Example]:
    """A row of Definite Pronoun Resolution in the form of WSC; the candidates stay.

    The first occurrence of the pronoun is the one to resolve.

    Raises:
      ConfigError: a field is missing or of another type.
    """
    candidates = text_list(spec, row, "candidates")
    pronoun = re.escape(text_field(spec, row, "pronoun"))
    sentence = text_field(spec, row, "sentence")
    marked = re.sub(f" ({pronoun})( |\\.|,)", r" *\1*\2", sentence, count=1)
    target = candidates[row["label"]] if row.get("label", -1) >= 0 else UNLABELLED
    inputs = f"{word} {marked}" if word else marked
    return [{"inputs": inputs, "targets": target, "candidates": candidates}]


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
    labels=("entailment", "contradiction", "neutral"),
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
    splits=("test",),
    metrics=(),
)
AXG = _super_glue(
    "axg",
    word="rte",
    features=("hypothesis", "premise"),
    labels=ENTAILMENT,
    splits=("test",),
    metrics=(),
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
