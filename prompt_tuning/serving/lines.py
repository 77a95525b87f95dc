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

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import writing

STANDARD = "-"  # standard input, standard output
_FORM = 'Write each line as {"inputs": "the text"}, optionally with "prompt": "a prompt folder".'


class Line(NamedTuple):
    """One text to answer."""

    where: str  # file:line, for messages
    text: str
    prompt: str | None
    rest: dict[str, Any]  # the other fields of the object, which are copied to the answer


def is_table(path: str) -> bool:
    """Whether a file is a table by its name; INPUT_TEMPLATE makes the texts from its columns."""
    return Path(path).suffix.lower() in (".csv", ".tsv")


def has_table_rows(path: str) -> bool:
    """Whether a file is JSON by its name and its first object has no "inputs"."""
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        return False
    first = next((line for line in _read(path) if line.strip()), b"")
    return b'"inputs"' not in first


def read_lines(path: str, *, prompt: str | None) -> list[Line]:
    """The texts of a file, or of standard input for "-"; `prompt` is the default of each line.

    A file contains JSON objects if its name ends in .json or .jsonl, or if its first line begins
    with a brace and the name does not end in .txt. Otherwise every line is a text, even an empty
    line.

    Raises:
      ConfigError: the file cannot be read, or a line has another format.
    """
    name = "standard input" if path == STANDARD else path
    places = [(f"{name}:{n}", data) for n, data in enumerate(_read(path), 1)]
    lines = [(where, _decode(data, where)) for where, data in places]
    filled = [(where, text) for where, text in lines if text.strip()]
    if not filled:
        raise ConfigError(f"{name} has no rows to answer.")
    if _is_json(path, filled[0][1]):
        return [_from_json(where, text, prompt) for where, text in filled]
    return [Line(where, text, prompt, {}) for where, text in lines]


def _read(path: str) -> list[bytes]:
    try:
        file = None if path == STANDARD else Path(path).expanduser()
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--input: {path} cannot be read ({error.strerror}). Give a file of texts or JSON "
            "lines, or - for standard input."
        ) from error
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error.reason}, byte {error.start}).") from error


def _is_json(path: str, first: str) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".jsonl", ".txt"):
        return suffix != ".txt"
    return first.lstrip().startswith("{")


def _from_json(where: str, text: str, prompt: str | None) -> Line:
    try:
        value = json.loads(text)
        # Half of a surrogate pair is valid JSON, but it cannot be tokenised or written.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error}). {_FORM}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found JSON of type {type(value).__name__}. {_FORM}")
    if not isinstance(value.get("inputs"), str):
        problem = type(value["inputs"]).__name__ if "inputs" in value else f"only {sorted(value)}"
        raise ConfigError(f'{where}: expected a text under "inputs", found {problem}. {_FORM}')
    named = value.pop("prompt", prompt)
    if named is not None and not isinstance(named, str):
        raise ConfigError(
            f'{where}: "prompt" is {named!r}. Expected the path of a prompt, or null.'
        )
    return Line(where, value.pop("inputs"), named or None, value)


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
    plain = place.is_file() or not place.exists()
    new = place.with_name(f".{place.name}.tmp") if plain else place
    try:
        if "://" in str(path):
            raise OSError(0, "only local files are written")
        place.parent.mkdir(parents=True, exist_ok=True)
        file = new.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--output: the answers cannot be written to {path} ({error.strerror}). Choose another "
            "path."
        ) from error
    try:
        with writing(f"the answers in {path}", opened=True):
            with file:
                yield file
            if plain:
                new.replace(place)
    finally:
        if plain:
            new.unlink(missing_ok=True)
