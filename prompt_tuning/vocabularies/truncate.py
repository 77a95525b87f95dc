"""The tokens of an input, and what of it is cut where it is longer than TASK_FEATURE_LENGTHS.

Tasks, `t5x infer` and the predictor cut here alike. (`TRUNCATE = 'end'` is what seqio does, too.)
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from prompt_tuning.config import ConfigError, Truncate
from prompt_tuning.vocabularies.vocabulary import Vocabulary


class Field(NamedTuple):
    """Where in an input the text of a field is, in bytes of UTF-8."""

    name: str
    start: int
    end: int


class Input(str):
    """A text for the encoder that knows where its fields are; to all others it is a str."""

    fields: tuple[Field, ...]

    def __new__(cls, text: str, fields: Iterable[Field]) -> Input:
        """The text with its fields."""
        made = super().__new__(cls, text)
        made.fields = tuple(fields)
        return made


def join_fields(parts: Iterable[tuple[str, str, str | None]]) -> Input:
    """The input of triples (text of the template, text of the field behind it, its name).

    >>> join_fields([("q: ", "why?", "question"), (" now", "", None)]).fields
    (Field(name='question', start=3, end=7),)
    """
    texts, fields, end = [], [], 0
    for literal, text, name in parts:
        start = end + len(literal.encode("utf-8"))
        end = start + len(text.encode("utf-8"))
        texts += [literal, text]
        fields += [Field(name, start, end)] if name else []
    return Input("".join(texts), fields)


def encode_input(vocabulary: Vocabulary, text: str, length: int, truncate: Truncate) -> list[int]:
    """At most `length` ids of a text, end-of-sequence included.

    Of a longer text 'end' keeps the first ids. 'longest_field' drops the last ids of the longest
    field, and of others once they are the longest.

    Raises:
      ConfigError: the text is longer, and 'longest_field' does not know its fields.
    """
    ids = vocabulary.encode(text)
    if len(ids) < length:
        return [*ids, vocabulary.eos_id]
    if truncate == "end":
        return [*ids[: length - 1], vocabulary.eos_id]
    owners = _find_owners(vocabulary, text)
    return [*itertools.compress(ids, _keep_evenly(owners, text, length - 1)), vocabulary.eos_id]


class Loss(NamedTuple):
    """How many tokens of a field are left of how many."""

    field: str
    kept: int
    whole: int


def find_losses(
    vocabulary: Vocabulary, text: str, length: int, truncate: Truncate
) -> tuple[Loss, ...]:
    """The fields that `encode_input` cuts; () if the text fits, or its fields are not known."""
    fields = getattr(text, "fields", ())
    if not fields or len(vocabulary.encode(text)) < length:
        return ()
    owners = _find_owners(vocabulary, text)
    if truncate == "end":
        keep = [place < length - 1 for place in range(len(owners))]
    else:
        keep = _keep_evenly(owners, text, length - 1)
    kept = list(itertools.compress(owners, keep))
    losses = (
        Loss(field.name, kept.count(number), owners.count(number))
        for number, field in enumerate(fields)
    )
    return tuple(loss for loss in losses if loss.kept < loss.whole)


def describe_losses(
    vocabulary: Vocabulary, texts: Iterable[str], length: int, truncate: Truncate
) -> str:
    """What of their fields the texts lose, and the cure; "" if their fields are not known."""
    losses = [loss for text in texts for loss in find_losses(vocabulary, text, length, truncate)]
    whole = collections.Counter(loss.field for loss in losses if not loss.kept)
    part = collections.Counter(loss.field for loss in losses if loss.kept)
    lost = [f"{n} lose all of {name!r}" for name, n in whole.items()]
    lost += [f"{n} lose the end of {name!r}" for name, n in part.items()]
    cure = ". TRUNCATE = 'longest_field' cuts the longest field instead" if whole else ""
    return ", ".join(lost) + cure


def _find_owners(vocabulary: Vocabulary, text: str) -> list[int | None]:
    """For each token of a text the number of the field that has its last byte."""
    _, ends = vocabulary.encode_with_ends(text)
    fields = getattr(text, "fields", ())
    if not fields:
        return [None] * len(ends)
    _, starts, stops = zip(*fields, strict=True)
    places = np.searchsorted(stops, ends).tolist()  # the first field that ends there or later
    pairs = zip(places, ends, strict=True)
    return [n if n < len(fields) and starts[n] < end else None for n, end in pairs]


def _keep_evenly(owners: Sequence[int | None], text: str, room: int) -> list[bool]:
    """Which tokens stay: all outside of the fields, and of every field the same number at most."""
    has_fields = bool(getattr(text, "fields", ()))
    if not has_fields or owners.count(None) > room:
        what = "its other words alone are too many" if has_fields else "its fields are not known"
        raise ConfigError(
            f"TRUNCATE = 'longest_field': the input {text[:40]!r}... is too long for "
            f"TASK_FEATURE_LENGTHS, and {what}. Give rows with fields, which INPUT_TEMPLATE joins, "
            "or set TRUNCATE = 'end'."
        )
    counts = collections.Counter(owner for owner in owners if owner is not None)
    left = dict.fromkeys(counts, 0)
    for _ in range(room - owners.count(None)):  # to the field of which least is left
        open_fields = [n for n in sorted(counts) if left[n] < counts[n]]
        left[min(open_fields, key=left.__getitem__)] += 1
    keep = []
    for owner in owners:
        keep.append(owner is None or left[owner] > 0)
        if owner is not None:
            left[owner] -= 1
    return keep
