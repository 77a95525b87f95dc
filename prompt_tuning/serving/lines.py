"""Input and output files of `t5x infer`: texts or JSON objects, and the JSON lines of the answers.

`infer.py` reads its rows and writes its answers through this module.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from prompt_tuning.config import ConfigError, FileTask
from prompt_tuning.runtime import replace_folder as files
from prompt_tuning.runtime.replace_folder import writing
from prompt_tuning.tasks.file_reader import STANDARD, Row, Source, parse_rows, split_lines

_FORM = 'Write each line as {"inputs": "the text"}, optionally with "prompt": "a prompt folder".'


class Line(NamedTuple):
    """One text to answer."""

    where: str  # file:line, for messages
    text: str
    prompt: str | None
    rest: dict[str, Any]  # the other fields of the object, which are copied to the answer


def read_lines(source: Source, *, prompt: str | None) -> list[Line]:
    """The whole texts of a source, one a line or under "inputs" in JSON.

    `prompt` is the default of each. An empty line of text is a text, too.

    Raises:
      ConfigError: a line has another form.
    """
    if source.form == "json":
        return [_to_line(row, prompt) for row in parse_rows(source, FileTask())]
    texts = enumerate(split_lines(source.text), 1)
    return [Line(f"{source.name}:{number}", text, prompt, {}) for number, text in texts]


def _to_line(row: Row, prompt: str | None) -> Line:
    rest = dict(row.fields)
    if not isinstance(rest.get("inputs"), str):
        problem = type(rest["inputs"]).__name__ if "inputs" in rest else f"only {sorted(rest)}"
        raise ConfigError(
            f'{row.where}: expected a text under "inputs", found {problem}. {_FORM} Of rows with '
            "fields INPUT_TEMPLATE makes the text, where it or TRAIN_FILE is set."
        )
    if "text" in rest:  # what INPUT_TEMPLATE names by default, and takes of a table
        raise ConfigError(
            f'{row.where}: found "inputs" and "text": which one is the text? Remove the other, or '
            "set INPUT_TEMPLATE = '{inputs}'."
        )
    named = rest.pop("prompt", prompt)
    if named is not None and not isinstance(named, str):
        raise ConfigError(
            f'{row.where}: "prompt" is {named!r}. Expected the path of a prompt, or null.'
        )
    return Line(row.where, rest.pop("inputs"), named or None, rest)


def write_line(file: TextIO, record: Mapping[str, Any]) -> None:
    """Writes one JSON object."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[TextIO]:
    """A file that replaces `path` when the block ends without an error.

    It is opened at once, so that an unwritable path is an error before any work is done. "-" is
    standard output. A path that exists and is no plain file, such as /dev/null, is written to
    directly.

    Raises:
      ConfigError: the path cannot be written to.
    """
    if str(path) == STANDARD:
        yield sys.stdout
        sys.stdout.flush()
        return
    place = Path(path).expanduser().resolve()
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(f"the answers in {path}", opened=True))
        try:
            if "://" in str(path):
                raise OSError(0, "only local files are written")
            place.parent.mkdir(parents=True, exist_ok=True)
            plain = place.is_file() or not place.exists()
            new = stack.enter_context(files.replace_file(place)) if plain else place
            file = stack.enter_context(new.open("w", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--output: the answers cannot be written to {path} ({error.strerror}). Choose "
                "another path."
            ) from error
        yield file
