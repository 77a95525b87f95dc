"""Postprocessing: the text of a model's output becomes the value that the metrics take.

seqio calls these functions as a task's `postprocess_fn(output, example=..., is_target=...)`: with
the text of a prediction or a target, and its example, whose texts are bytes. `metrics.py` follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Postprocess = Callable[..., Any]

# Words that do not tell one referent from another: articles, possessives, demonstratives and
# quantifiers.
DETERMINERS = frozenset(
    [
        *("a", "an", "the", "this", "that", "these", "those"),
        *("my", "your", "his", "her", "our", "their", "whose", "which"),
        *("each", "every", "many", "much", "few", "some"),
    ]
)


def label_index(output: str, *, labels: Sequence[str], **_: Any) -> int:
    """The index of the label that equals the output; -1 if none does.

    >>> label_index("True", labels=("False", "True")), label_index("true", labels=("False", "True"))
    (1, -1)
    """
    return labels.index(output) if output in labels else -1


def to_label(*labels: str) -> Postprocess:
    """`label_index` among these labels."""
    return functools.partial(label_index, labels=labels)


def to_label_of(words: Mapping[str, str], *labels: str) -> Postprocess:
    """`label_index` after replacing the words of another task with those of this one.

    Two tasks may have the same classes under different words. A prompt trained on the first is
    then scored on the second.
    """

    def translated(output: str, **_: Any) -> int:
        for source_word, target_word in words.items():
            output = output.replace(source_word, target_word)
        return label_index(output, labels=labels)

    return translated


def multirc_label(
    output: str, *, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> dict[str, Any]:
    """The index of False or True; a target also has the question that the answer belongs to."""
    value = {"value": label_index(output, labels=("False", "True"))}
    if not is_target:
        return value
    assert example is not None, "a target of MultiRC comes with its example"
    return {**value, "group": int(example["idx/question"])}


def pair_label(
    output: str,
    *,
    labels: Sequence[str],
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> dict[str, Any]:
    """The index of the label; a target also has its pair: rows 2i and 2i + 1 of AX-g are one."""
    value = {"value": label_index(output, labels=labels)}
    if not is_target:
        return value
    assert example is not None, "a target of AX-g comes with its example"
    return {**value, "group": int(example["idx"]) // 2}


def record_answer(
    output: str, *, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> dict[str, Any]:
    """The text; a target has all answers of its query, and the query."""
    if not is_target:
        return {"value": output}
    assert example is not None, "a target of ReCoRD comes with its example"
    group = (int(example["idx/passage"]), int(example["idx/query"]))
    return {"value": texts(example["answers"]), "group": group}


def any_answer(
    output: str, *, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | list[str]:
    """The text; a target has all answers of its question."""
    if not is_target:
        return output
    assert example is not None, "a target of a question comes with its example"
    return texts(example["answers"])


def names_referent(
    output: str, *, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> int:
    """Whether the output names the referent of a WSC row: 1, 0, or -1 for no answer.

    A target is the row's label. An output names the referent if all words of the shorter of the two
    are words of the other. Case and determiners are ignored. A possessive never matches a name
    that is not one.

    >>> example = {"targets_pretokenized": b"The fluffy bunny", "label": 1}
    >>> [names_referent(x, example=example) for x in ("bunny", "the bunny's", "Bob", "the")]
    [1, 0, 0, -1]
    """
    assert example is not None, "an answer of WSC comes with its example"
    if is_target:
        return int(example["label"])
    answer, referent = _content(output), _content(text(example["targets_pretokenized"]))
    if not answer:
        return -1
    if ("'" in answer) != ("'" in referent):
        return 0
    some, others = set(answer.split(" ")), set(referent.split(" "))
    return int(some <= others or others <= some)


def _content(answer: str) -> str:
    words = answer.strip().lower().split(" ")
    return " ".join(word for word in words if word not in DETERMINERS)


def number(output: str, **_: Any) -> float:
    """The output as a number; -1 if it is not a number.

    >>> number("3.4"), number("three")
    (3.4, -1.0)
    """
    try:
        return float(output)
    except ValueError:
        return -1.0


def texts(values: Any) -> list[str]:
    """Texts of an example, which seqio hands over as bytes."""
    return [text(value) for value in values]


def text(value: str | bytes) -> str:
    """A text of an example."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
