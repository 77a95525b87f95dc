"""Rows of SuperGLUE's official JSONL release, in which some tasks are nested.

`tasks/prepare.py` checks files with it before TFDS' builder reads them: what is wrong with a row is
said with the name of the field.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import superglue

Key = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Official:
    """One configuration of TFDS' `super_glue` as the release has it."""

    folder: str  # of the release; its archive is <folder>.zip
    check: Callable[[Any, bool], Iterator[Key]]  # (row, labelled) -> the keys of its examples


class Fields:
    """The fields of a JSON object, each asked for with what it has to be.

    Raises ConfigError from every method: the field is missing, or something else.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        """`path` is where in the row the object stands."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the field {path!r} must be an object, found {values!r}.")
        self.values, self.path = values, path

    def _bad(self, name: str, wanted: str) -> ConfigError:
        found = self.values.get(name)
        return ConfigError(f"the field {self._where(name)!r} must be {wanted}, found {found!r}.")

    def _where(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def text(self, name: str) -> str:
        """A field that is text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._bad(name, "text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._bad(name, "text in Unicode, without halves of characters") from None
        return value

    def whole(self, name: str) -> int:
        """A field that is a whole number of 32 bits."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
            raise self._bad(name, "a whole number")
        return value

    def label(self, wanted: tuple[Any, ...]) -> None:
        """Makes sure that the label is one of these, of their type."""
        value = self.values.get("label")
        if not any(value == label and type(value) is type(label) for label in wanted):
            raise self._bad("label", "one of " + ", ".join(map(str, wanted)))

    def object(self, name: str) -> Fields:
        """A field that is an object."""
        return Fields(self.values.get(name), self._where(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """A field that is a list of objects."""
        values = self.values.get(name)
        if not isinstance(values, list):
            raise self._bad(name, "a list")
        for i, value in enumerate(values):
            yield Fields(value, f"{self._where(name)}[{i}]")


def flat(texts: tuple[str, ...], labels: tuple[Any, ...], numbers: tuple[str, ...] = ()) -> Any:
    """The check of rows that have these texts, numbers and labels."""

    def check(row: Any, labelled: bool) -> Iterator[Key]:
        fields = Fields(row)
        for name in texts:
            fields.text(name)
        for name in numbers:
            fields.whole(name)
        if labelled or "label" in fields.values:
            fields.label(labels)
        yield fields.whole("idx")

    return check


def multirc(row: Any, labelled: bool) -> Iterator[Key]:
    """A passage with questions with answers: an example for each answer."""
    fields = Fields(row)
    passage, index = fields.object("passage"), fields.whole("idx")
    passage.text("text")
    for question in passage.objects("questions"):
        question.text("question")
        for answer in question.objects("answers"):
            answer.text("text")
            if labelled or "label" in answer.values:
                answer.label((0, 1, False, True))
            yield index, question.whole("idx"), answer.whole("idx")


def record(row: Any, labelled: bool) -> Iterator[Key]:
    """A passage with marked entities and queries: one row for each query."""
    fields = Fields(row)
    passage = fields.object("passage")
    fields.whole("idx")
    text = passage.text("text")
    for entity in passage.objects("entities"):
        start, end = entity.whole("start"), entity.whole("end")
        if not 0 <= start <= end < len(text):
            raise ConfigError(
                f"the fields {entity.path + '.start'!r} and 'end' must be places in the text, "
                f"found {start} and {end}; the text has {len(text)} characters."
            )
    for query in fields.objects("qas"):
        query.text("query")
        if labelled or "answers" in query.values:
            for answer in query.objects("answers"):
                answer.text("text")
        yield query.whole("idx")


def wsc(row: Any, labelled: bool) -> Iterator[Key]:
    """A text with two spans, the second of which is a pronoun."""
    fields = Fields(row)
    text, target = fields.text("text"), fields.object("target")
    for span in ("span1", "span2"):
        index, words = target.whole(f"{span}_index"), target.text(f"{span}_text")
        if not 0 <= index < len(text.split()):
            raise ConfigError(
                f"the field 'target.{span}_index' must be the number of a word, found {index}; the "
                f"text has {len(text.split())}."
            )
        if not _is_span(words, text, index):
            raise ConfigError(
                f"the field 'target.{span}_text' must be in the text, found {words!r}."
            )
    if not any(_is_pronoun(word, words.lower()) for word in text.lower().split(" ")):
        raise ConfigError(f"the pronoun {words!r} (span2_text) is not a word of {text!r}.")
    if labelled or "label" in fields.values:
        fields.label((False, True))
    yield fields.whole("idx")


def _is_pronoun(word: str, pronoun: str) -> bool:
    rest = word[len(pronoun) :]
    return word.startswith(pronoun) and re.fullmatch(superglue.AFTER_PRONOUN, rest) is not None


def _is_span(words: str, text: str, index: int) -> bool:
    """Whether the text has these words, as they are or as TFDS' `wsc.fixed` mends them.

    It mends the case of the first letter, a full stop at the end, and line breaks.
    """
    change = str.lower if text.split()[index][0].islower() else str.upper
    mended = (change(words[:1]) + words[1:]).rstrip(".").replace("\n", " ")
    return words in text or mended in text or words in APART


# Spans of the release that other words of their texts stand between: TFDS leaves them alone.
APART = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")


RELEASE = MappingProxyType(
    {
        "boolq": Official("BoolQ", flat(("passage", "question"), (False, True))),
        "cb": Official("CB", flat(("premise", "hypothesis"), superglue.CB.labels)),
        "copa": Official(
            "COPA", flat(("premise", "choice1", "choice2", "question"), (0, 1, False, True))
        ),
        "multirc": Official("MultiRC", multirc),
        "record": Official("ReCoRD", record),
        "rte": Official("RTE", flat(("premise", "hypothesis"), superglue.ENTAILMENT)),
        "wic": Official(
            "WiC",
            flat(
                ("word", "sentence1", "sentence2"),
                (False, True),
                ("start1", "start2", "end1", "end2"),
            ),
        ),
        "wsc": Official("WSC", wsc),
        "wsc.fixed": Official("WSC", wsc),
        "axb": Official("AX-b", flat(("sentence1", "sentence2"), superglue.ENTAILMENT)),
        "axg": Official("AX-g", flat(("premise", "hypothesis"), superglue.ENTAILMENT)),
    }
)
