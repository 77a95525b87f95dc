"""The tables' conversions in plain Python: what those in TensorFlow's operations are held to."""

import re

import numpy as np

from prompt_tuning.tasks import glue, qa, superglue
from prompt_tuning.tasks import spec as tasks
from prompt_tuning.tasks.release import AFTER_PRONOUN
from prompt_tuning.tasks.spec import TaskSpec


def to_examples(spec: TaskSpec, row: dict, *, task_word: bool = True) -> list[dict]:
    """The examples of one row: one, several, or none."""
    word = spec.word if task_word else ""
    return CONVERSIONS[spec.convert](spec, row, [word] if word else [])


def labelled(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    for feature, column in zip(spec.features, spec.columns or spec.features, strict=True):
        pieces = [*pieces, f"{feature}:", row[column]]
    target = [*spec.labels, "<unk>"][row["label"]]
    inputs = clean(" ".join(pieces), spec.clean)
    return [{**index(row), "inputs": inputs, "targets": target}]


def similarity(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    for feature in spec.features:
        pieces = [*pieces, f"{feature}:", row[feature]]
    score = np.round(np.float32(row["label"]) * np.float32(5)) / np.float32(5)
    return [{**index(row), "inputs": " ".join(pieces), "targets": f"{score:.1f}"}]


def record(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    passage = clean(row["passage"], superglue.HIGHLIGHTS)
    entities = ", ".join(row["entities"])
    pieces = [*pieces, "query:", row["query"], "entities:", entities, "passage:", passage]
    shared = {
        **index(row),
        "inputs": " ".join(pieces),
        "answers": row["answers"],
        "entities": row["entities"],
    }
    return [{**shared, "targets": answer} for answer in row["answers"] or ["<unk>"]]


def wsc(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    marked = mark_pronoun(row["text"], row["span2_index"], row["span2_text"])
    inputs = " ".join([*pieces, marked])
    return [
        {**index(row), "inputs": inputs, "targets": row["span1_text"], "label": row["label"]},
    ]


def wsc_right(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    return wsc(spec, row, pieces) if row["label"] == 1 else []


def mark_pronoun(text: str, number: int, pronoun: str) -> str:
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if is_pronoun(word, pronoun)]
    place = min(places, key=lambda i: abs(i - number))
    rest = words[place][len(pronoun) :]
    after = [rest, *words[place + 1 :]] if rest else words[place + 1 :]
    blank = " ".join([" ".join(words[:place]), "X", " ".join(after)])
    marked = blank.replace(" X ", f" *{pronoun}* ")
    marked = marked.rstrip(" ") if place != number or rest else marked
    return marked if place else marked[1:]


def is_pronoun(word: str, pronoun: str) -> bool:
    rest = word[len(pronoun) :]
    return word.startswith(pronoun) and re.fullmatch(AFTER_PRONOUN, rest) is not None


def dpr(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    pattern = f" ({re.escape(row['pronoun'])})( |\\.|,)"
    marked = re.sub(pattern, r" *\1*\2", row["sentence"], count=1)
    target = [*row["candidates"], "<unk>"][row["label"]]
    inputs = " ".join([*pieces, marked])
    return [{"inputs": inputs, "targets": target, "candidates": row["candidates"]}]


def question(spec: TaskSpec, row: dict, pieces: list[str]) -> list[dict]:
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    answers = [clean(answer, qa.SPACED) for answer in answers]
    asked, context = (clean(row[key], qa.SPACED) for key in ("question", "context"))
    return [
        {
            **({"id": row["id"]} if "id" in row else {"idx": row["qid"]}),
            "inputs": clean(f"question: {asked} context: {context}", qa.COLLAPSED),
            "targets": answers[0] if answers else "<unk>",
            "question": asked,
            "context": context,
            "answers": answers,
        }
    ]


def index(row: dict) -> dict:
    value = row.get("idx")
    if isinstance(value, dict):
        return {f"idx/{key}": inner for key, inner in value.items()}
    return {} if value is None else {"idx": value}


def clean(text: str, rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


CONVERSIONS = {
    tasks.labelled: labelled,
    superglue.record: record,
    superglue.wsc: wsc,
    superglue.wsc_right: wsc_right,
    superglue.dpr: dpr,
    glue.similarity: similarity,
    qa.question: question,
}
