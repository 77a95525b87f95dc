"""INPUT_TEMPLATE: a text with the names of fields in braces, as Python's `str.format` writes it."""

from __future__ import annotations

import string
from collections.abc import Callable

from prompt_tuning.config import ConfigError

EXAMPLE = "Such as 'review: {text}'; a brace itself is written {{ or }}."


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs (literal text, name of the field that follows it, or None at the end).

    >>> parse_template("q: {question} {{}}")
    [('q: ', 'question'), (' {', None), ('}', None)]

    Raises:
      ConfigError: a brace is left open, or no field is named.
    """
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"INPUT_TEMPLATE = {template!r}: {error}. {EXAMPLE}") from error
    for _, name, form, conversion in found:
        if form or conversion:
            mark = f"!{conversion}" if conversion else f":{form}"
            raise ConfigError(
                f"INPUT_TEMPLATE = {template!r}: {{{name}{mark}}} asks for a format; only names "
                f"of fields are filled in. {EXAMPLE}"
            )
        if name == "":
            raise ConfigError(f"INPUT_TEMPLATE = {template!r}: {{}} names no field. {EXAMPLE}")
    parts = [(literal, name) for literal, name, _, _ in found]
    if not any(name for _, name in parts):
        raise ConfigError(
            f"INPUT_TEMPLATE = {template!r} names no field, so every row would be the same text. "
            f"{EXAMPLE}"
        )
    return parts


def fill_template(parts: list[tuple[str, str | None]], text: Callable[[str], str]) -> str:
    """The template with what `text` gives for each field; braces in it stay as they are.

    >>> fill_template(parse_template("q: {question}"), {"question": "why {x}?"}.__getitem__)
    'q: why {x}?'
    """
    return "".join(literal + (text(name) if name else "") for literal, name in parts)
