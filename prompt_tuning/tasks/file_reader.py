"""The user's own files as rows: CSV, TSV, JSON lines, or one JSON list.

`file_examples.py` makes examples of the rows. A mistake in a file is an error that names file, line
and column: no row is dropped, guessed or repaired.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning.config import ConfigError, FileTask

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


class Row(NamedTuple):
    """One row of a file: its fields, and its line."""

    where: str  # file:line, for messages
    fields: Mapping[str, Any]  # text in CSV; what JSON can hold in JSON
    header: bool = False  # a first line named the fields


def read_rows(path: str, config: FileTask) -> list[Row]:
    """The rows of a file in its order; blank lines are no rows.

    Raises:
      ConfigError: the file is missing, holds no rows, or is malformed somewhere.
    """
    text = _read_text(path)
    if not text.strip():
        raise ConfigError(f"{path} is empty: expected rows of data.")
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        rows = list(_read_table(path, text, config))
    elif text.lstrip().startswith("["):
        rows = _read_list(path, text)
    else:
        rows = list(_read_lines(path, text))
    if not rows:
        raise ConfigError(f"{path} has no rows{' but its header' if text[0] != '[' else ''}.")
    return rows


def _read_text(path: str) -> str:
    place = Path(path).expanduser()
    if place.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}. Spreadsheets and Parquet "
            "files can be saved as CSV (UTF-8)."
        )
    if "://" in path:
        raise ConfigError(f"{path}: only local files are read. Copy it here.")
    if not place.is_file():
        folder = place.parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        there = f"{folder.resolve()} has" if names else f"there is nothing in {folder.resolve()}"
        near = difflib.get_close_matches(place.name, names, n=1)
        hint = f" Did you mean {folder / near[0]}?" if near else f" ({there} {_some(names)}.)"
        raise ConfigError(f"there is no file {path}.{hint}")
    try:
        data = place.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from error
    return _decode(path, data)


def _some(names: Sequence[str]) -> str:
    shown = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)[:5]
    return ", ".join(shown) if shown else "no such files" if names else ""


def _decode(path: str, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path} is UTF-16, not UTF-8: save it as CSV UTF-8.")
    data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that Excel writes
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        around = data[max(0, error.start - 20) : error.start].decode("utf-8", errors="replace")
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x} after {around!r}). Save the "
            "file as UTF-8; in a shell: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW."
        ) from error


# Tables -----------------------------------------------------------------------------------------


def _read_table(path: str, text: str, config: FileTask) -> Iterator[Row]:
    records = _read_records(path, text, config)
    where, names = next(records)
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: the header names {_quoted(twice)} twice: {_quoted(names)}.")
    for where, values in records:
        if len(values) != len(names):
            cure = _separator(names)
            cure = cure or " A field that holds the delimiter or a line break must be in quotes."
            raise ConfigError(
                f"{where}: found {len(values)} fields where the header has {len(names)} "
                f"({_quoted(names)}); the line begins {_short(values[0])}.{cure}"
            )
        yield Row(where, dict(zip(names, values, strict=True)), header=True)


def _read_records(path: str, text: str, config: FileTask) -> Iterator[tuple[str, list[str]]]:
    """The place and the fields of every record; the first one is the header."""
    usual = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    style: dict[str, Any] = {"delimiter": config.delimiter or usual, "strict": True}
    if config.quote_char:
        style |= {"quotechar": config.quote_char}
    else:
        style |= {"quoting": csv.QUOTE_NONE, "quotechar": None}
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    line = 1
    limit = csv.field_size_limit(sys.maxsize)  # of the whole program: put back below
    try:
        while True:
            where = f"{path}:{line}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ConfigError(f"{where}: {_explain(error, where, reader.line_num)}") from error
            line = reader.line_num + 1
            if values:
                yield where, values
    finally:
        csv.field_size_limit(limit)


def _explain(error: csv.Error, where: str, last: int) -> str:
    """What the csv module says, with the cure."""
    if "unexpected end of data" in str(error):
        what = "a quote opens here and is never closed"
    else:
        what = f"malformed quoting ({error}, line {last})"
    return (
        f'{what}. Inside quotes a quote is written twice (""); where quotes are characters like '
        "any other, set QUOTE_CHAR = ''."
    )


# JSON -------------------------------------------------------------------------------------------


def _read_lines(path: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(where, _object(where, _parse(where, line)))


def _read_list(path: str, text: str) -> list[Row]:
    values = _parse(path, text)
    places = [f"{path}, item {number}" for number in range(1, len(values) + 1)]
    return [Row(place, _object(place, value)) for place, value in zip(places, values, strict=True)]


def _parse(where: str, text: str) -> Any:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        pairs = list(pairs)
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{where}: {_quoted(twice)} is there twice.")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
        # Half of a surrogate pair is JSON, but no text that could be tokenised or written.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not valid JSON ({error}); it begins {_short(text)}. Write one object a line "
            "(.jsonl), or a list of them (.json)."
        ) from error
    return value


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f'{where}: expected an object such as {{"text": ..., "label": ...}}, found '
            f"{_short(json.dumps(value))}."
        )
    return value


# Fields -----------------------------------------------------------------------------------------


def text_of(row: Row, name: str, used_by: str) -> str:
    """What a field holds, as text: JSON's numbers and booleans as JSON writes them.

    Raises:
      ConfigError: there is no such field (the nearest is named), or it holds no text.
    """
    value = value_of(row, name, used_by)
    if isinstance(value, str):
        return value
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, (bool, int, float)) and finite:
        return json.dumps(value)
    cure = ' Nothing at all is "".' if value is None else ""
    if isinstance(value, (dict, list)):
        cure = " What is inside cannot be named: give it a field of its own."
    raise ConfigError(
        f"{row.where}: the field {name!r} holds {_short(json.dumps(value))}; {used_by} needs "
        f"text.{cure}"
    )


def value_of(row: Row, name: str, used_by: str) -> Any:
    """What a field holds.

    Raises:
      ConfigError: there is no such field; the nearest is named.
    """
    if name in row.fields:
        return row.fields[name]
    names = [field for field in row.fields if field]
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1)
    hint = next((f" Did you mean {n!r}?" for n in names if near and n.lower() == near[0]), "")
    inside = next((n for n in names if name.startswith((f"{n}.", f"{n}["))), None)
    if separator := _separator(names):
        hint = separator
    elif isinstance(row.fields.get(inside or ""), (dict, list)):
        hint = f" What is inside {inside!r} cannot be named: give it a field of its own."
    elif not hint and row.header:
        hint = " (The first line of a table names its columns.)"
    raise ConfigError(
        f"{row.where}: there is no field {name!r}, which {used_by} names; there are "
        f"{_quoted(names)}.{hint}"
    )


def _separator(names: Sequence[str]) -> str:
    """What to do about a header that is a single name with another delimiter in it."""
    marks = [mark for mark in ";\t|," if len(names) == 1 and mark in names[0]]
    if not marks:
        return ""
    return f" If {marks[0]!r} is what separates its columns, set DELIMITER = {marks[0]!r}."


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
