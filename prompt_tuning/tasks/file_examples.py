"""Rows of the user's own files as inputs and targets, and the held-out part.

After `file_reader.py`; `file_tasks.py` makes a seqio task of the examples, and `serving/infer.py`
answers the rows.
"""

from __future__ import annotations

import collections
import difflib
import functools
import hashlib
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning.config import ConfigError, FileTask, label_key
from prompt_tuning.tasks.file_reader import (
    Row,
    Source,
    find_field,
    parse_rows,
    read_rows,
    split_lines,
    text_of,
    value_of,
)
from prompt_tuning.vocabularies.truncate import Input, join_fields

TRAIN, EVAL = "train", "validation"
SHOWN = 5  # values of a list in a message


class Example(NamedTuple):
    """The texts of one row."""

    inputs: Input
    targets: str | None  # None: the row has no label
    where: str  # file:line
    empty: bool = False  # all fields that the template names are empty


def load_split(config: FileTask, split: str) -> list[Example]:
    """The examples of "train" or "validation", in the order of their file.

    Raises:
      ConfigError: a file is malformed, a field is missing, or a label is not known.
    """
    if split == EVAL and config.eval_file:
        return make_examples(read_rows(config.eval_file, config), config, labelled=False)
    examples = make_examples(read_rows(config.train_file, config), config, labelled=True)
    if config.eval_file:
        return examples
    held_out = hold_out(examples, config.eval_share)
    if len(held_out) in (0, len(examples)):
        raise ConfigError(
            f"EVAL_SHARE = {config.eval_share} of the {len(examples)} rows in {config.train_file} "
            f"leaves {'nothing to score' if not held_out else 'nothing to train on'}: set another "
            "share, or an EVAL_FILE."
        )
    return [e for i, e in enumerate(examples) if (i in held_out) == (split == EVAL)]


def make_examples(rows: Sequence[Row], config: FileTask, *, labelled: bool) -> list[Example]:
    """The inputs and targets of every row.

    Raises:
      ConfigError: as `load_split`; with `labelled`, also where a row has no label.
    """
    inputs = fill_inputs(rows, config)
    answers: list[str | None] = [None] * len(rows)
    if labelled or any(find_field(row.fields, config.target_field) for row in rows):
        answers = [_read_answer(row, config) for row in rows]
    if labelled and None in answers:
        _refuse_unlabelled([row for row, a in zip(rows, answers, strict=True) if a is None], config)
    if config.words:
        answers = _find_words(rows, answers, config)
    named = field_names(config)
    return [
        Example(text, answer, row.where, not any(text_of(row, n, "").strip() for n in named))
        for text, answer, row in zip(inputs, answers, rows, strict=True)
    ]


def rows_to_answer(source: Source, config: FileTask) -> list[Row]:
    """The rows of a source, without their answers.

    A line of text is the field that INPUT_TEMPLATE names, which can only be one then.

    Raises:
      ConfigError: it holds no rows or other fields, or is malformed somewhere.
    """
    if source.form != "lines":
        return parse_rows(source, config)
    names, lines = field_names(config), split_lines(source.text)
    if len(names) > 1:
        raise ConfigError(
            f"{source.name}: found lines of text (the first: {lines[0][:40]!r}), and "
            f"INPUT_TEMPLATE = {config.input_template!r} names {len(names)} fields. Give a table "
            "whose first line names them, or JSON lines."
        )
    return [Row(f"{source.name}:{n}", {names[0]: line}) for n, line in enumerate(lines, 1)]


def field_names(config: FileTask) -> list[str]:
    """The fields that INPUT_TEMPLATE names, each once.

    Raises:
      ConfigError: the template is malformed.
    """
    names = [name for _, name in parse_template(config.input_template) if name]
    return list(dict.fromkeys(names))


def fill_inputs(rows: Sequence[Row], config: FileTask) -> list[Input]:
    """INPUT_TEMPLATE with the fields of every row.

    Raises:
      ConfigError: the template is malformed, gives the answer away, or names a field that a row
        does not have.
    """
    parts = parse_template(config.input_template)
    if find_field([name for _, name in parts if name], config.target_field) is not None:
        raise ConfigError(
            f"INPUT_TEMPLATE = {config.input_template!r} shows the model the field "
            f"{config.target_field!r}, which is the answer (TARGET_FIELD)."
        )
    return [
        fill_template(parts, functools.partial(text_of, row, used_by="INPUT_TEMPLATE"))
        for row in rows
    ]


def _read_answer(row: Row, config: FileTask) -> str | None:
    """The target field as text; None if it is empty."""
    value = value_of(row, config.target_field, "TARGET_FIELD")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = text_of(row, config.target_field, "TARGET_FIELD")
    return label_key(value) if config.words else text


def _refuse_unlabelled(rows: Sequence[Row], config: FileTask) -> None:
    more = f" ({len(rows)} rows are like this)" if len(rows) > 1 else ""
    raise ConfigError(
        f"{rows[0].where}: the field {config.target_field!r} (TARGET_FIELD) is empty{more}; a row "
        "to train on needs an answer. Rows without one can be answered with `t5x infer`."
    )


# INPUT_TEMPLATE: the names of fields in braces, as Python's `str.format` writes them ----------

USAGE = "Such as 'review: {text}'; a brace itself is written {{ or }}."


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs (literal text, name of the field that follows it, or None at the end).

    >>> parse_template("q: {question} {{}}")
    [('q: ', 'question'), (' {', None), ('}', None)]

    Raises:
      ConfigError: a brace is left open, or no field is named.
    """
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"INPUT_TEMPLATE = {template!r}: {error}. {USAGE}") from error
    for _, name, form, conversion in fields:
        if form or conversion:
            mark = f"!{conversion}" if conversion else f":{form}"
            raise ConfigError(
                f"INPUT_TEMPLATE = {template!r}: {{{name}{mark}}} asks for a format; only names "
                f"of fields are filled in. {USAGE}"
            )
        if name == "":
            raise ConfigError(f"INPUT_TEMPLATE = {template!r}: {{}} names no field. {USAGE}")
    parts = [(literal, name) for literal, name, _, _ in fields]
    if not any(name for _, name in parts):
        raise ConfigError(
            f"INPUT_TEMPLATE = {template!r} names no field, so every row would be the same text. "
            f"{USAGE}"
        )
    return parts


def fill_template(parts: list[tuple[str, str | None]], text: Callable[[str], str]) -> Input:
    """The template with `text(field)` for each field; braces in a field stay as they are.

    >>> fill_template(parse_template("q: {question}"), {"question": "why {x}?"}.__getitem__)
    'q: why {x}?'
    """
    return join_fields((literal, text(name) if name else "", name) for literal, name in parts)


# Labels -----------------------------------------------------------------------------------------


def _find_words(
    rows: Sequence[Row], labels: Sequence[str | None], config: FileTask
) -> list[str | None]:
    """The word for every label.

    Raises:
      ConfigError: with all labels that no word belongs to.
    """
    known = label_table(config)
    words = [None if label is None else _look_up(label, known) for label in labels]
    unknown = [i for i, label in enumerate(labels) if label is not None and words[i] is None]
    if unknown:
        counts = collections.Counter(str(labels[i]) for i in unknown)
        shown = ", ".join(f"{value!r} ({n} rows)" for value, n in counts.most_common(SHOWN))
        near = difflib.get_close_matches(str(labels[unknown[0]]), known, n=1)
        more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        raise ConfigError(
            f"{rows[unknown[0]].where}: the field {config.target_field!r} holds labels that "
            f"LABEL_WORDS does not name: {shown}{more}. It names {', '.join(map(repr, known))}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    return words


def label_table(config: FileTask) -> Mapping[str, str]:
    """The word of every label that a row may have, from LABEL_WORDS in either of its forms.

    A list names the words of the labels 0, 1, ..., or of labels that are the words themselves. Of
    words that are numbers only the second is meant: 1 cannot be a word and a place at once.

    >>> label_table(FileTask(label_words=("bad", "good")))
    {'bad': 'bad', 'good': 'good', '0': 'bad', '1': 'good'}
    """
    words = config.label_words
    if isinstance(words, Mapping):
        return {label_key(label): word for label, word in words.items()}
    table = {label_key(word): word for word in words}
    if not any(re.fullmatch(r"-?\d+", label) for label in table):
        table |= {str(place): word for place, word in enumerate(words)}
    return table


def _look_up(label: str, known: Mapping[str, str]) -> str | None:
    return next((known[form] for form in _forms(label) if form in known), None)


def _forms(label: str) -> Iterator[str]:
    """The label and how other programs write it: Python's True, pandas' 1.0 for 1."""
    yield label
    if label.lower() in ("true", "false"):
        yield label.lower()
    if whole := re.fullmatch(r"(-?\d+)\.0+", label):
        yield whole.group(1)


# What is held out -------------------------------------------------------------------------------


def hold_out(examples: Sequence[Example], share: float) -> set[int]:
    """The indices of the rows that are held out for evaluation, a `share` of the different texts.

    It depends on the texts alone: it is the same on every machine and in every order of the file.
    Rows with the same text stay together, and each answer is held out in proportion.
    """
    places: dict[str, list[int]] = collections.defaultdict(list)
    for place, example in enumerate(examples):
        places[example.inputs].append(place)

    def key(text: str) -> tuple[str, bytes]:
        answer = min(str(examples[place].targets) for place in places[text])
        return answer, hashlib.sha256(text.encode("utf-8")).digest()

    few = len({key(text)[0] for text in places}) > len(places) / 2  # free text: no classes
    order = sorted(places, key=lambda text: key(text)[few:])
    # Every 1/share-th, so that each answer is met as often as it occurs.
    chosen = [
        text
        for i, text in enumerate(order)
        if math.floor((i + 1) * share + 0.5) > math.floor(i * share + 0.5)
    ]
    return {place for text in chosen for place in places[text]}


def files_identity(config: FileTask) -> str:
    """The SHA-256, in hexadecimal, of the contents of the files; "" where there are none."""
    names = [name for name in (config.train_file, config.eval_file) if name]
    digest = hashlib.sha256()
    for name in names:
        digest.update(hashlib.sha256(Path(name).expanduser().read_bytes()).digest())
    return digest.hexdigest() if names else ""


def as_columns(examples: Sequence[Example], unlabelled: str) -> dict[str, list[Any]]:
    """The examples as the columns of a dataset; `unlabelled` stands for the answer of a row."""
    return {
        "inputs": [example.inputs for example in examples],
        "input_fields": [[field.name for field in e.inputs.fields] for e in examples],
        "input_spans": [[n for f in e.inputs.fields for n in (f.start, f.end)] for e in examples],
        "targets": [unlabelled if e.targets is None else e.targets for e in examples],
        "row": [example.where for example in examples],
        "empty": [example.empty for example in examples],
    }
