"""The user's own files as rows: CSV, TSV, JSON lines, or one JSON list.

`file_examples.py` makes examples of the rows. A mistake in a file is an error that names file, line
and column: no row is dropped, guessed or repaired. Quotes that would join rows are refused.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prompt_tuning.config import ConfigError, FileTask
from prompt_tuning.runtime.storage import describe_lfs_pointer

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
STANDARD = "-"  # standard input
Form = Literal["csv", "tsv", "json", "lines"]
_FORMS: Mapping[str, Form] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "lines",
}


class Row(NamedTuple):
    """One row of a file: its fields, and its line."""

    where: str  # file:line, for messages
    fields: Mapping[str, Any]  # text in CSV; what JSON can hold in JSON
    header: bool = False  # a first line named the fields


class Source(NamedTuple):
    """The text of a file, and what it is."""

    name: str  # for messages
    text: str
    form: Form


def read_rows(path: str, config: FileTask) -> list[Row]:
    """The rows of a file in its order; blank lines are no rows.

    Raises:
      ConfigError: the file is missing, holds no rows, or is malformed somewhere.
    """
    if (suffix := Path(path).suffix.lower()) not in SUFFIXES:
        raise ConfigError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}. Spreadsheets and Parquet "
            "files can be saved as CSV (UTF-8)."
        )
    return parse_rows(Source(path, read_text(path), _FORMS[suffix]), config)


def read_source(path: str, names: Sequence[str], config: FileTask) -> Source:
    """What a file holds, or standard input for "-": its name says so, else its beginning.

    It is JSON if an object comes first, and a table if its first line has all of `names`, whatever
    their case: the rows of a table whose names differ in case are refused, not read as text.

    Raises:
      ConfigError: it is missing, cannot be read, or holds nothing.
    """
    text, name = read_text(path), "standard input" if path == STANDARD else path
    if not text.strip():
        raise ConfigError(f"{name} is empty: expected rows.")
    if form := _FORMS.get(Path(path).suffix.lower()):
        return Source(name, text, form)
    if re.match(r"\s*(\[\s*)?\{", text):
        return Source(name, text, "json")
    first = text.partition("\n")[0]
    has_tabs = "\t" in first or config.train_file.lower().endswith(".tsv")
    forms: tuple[Form, ...] = ("tsv", "csv") if has_tabs else ("csv", "tsv")
    for form in forms:
        header = [field.casefold() for field in _read_header(Source(name, text, form), config)]
        if all(find_field(header, field.casefold()) is not None for field in names):
            return Source(name, text, form)
    return Source(name, text, "lines")


def parse_rows(source: Source, config: FileTask) -> list[Row]:
    """The rows of a table or of JSON.

    Raises:
      ConfigError: it holds no rows, or is malformed somewhere.
    """
    name, text, form = source
    if not text.strip():
        raise ConfigError(f"{name} is empty: expected rows of data.")
    rows = list(_read_json(name, text) if form == "json" else _read_table(source, config))
    if not rows:
        raise ConfigError(f"{name} has no rows{'' if form == 'json' else ' but its header'}.")
    return rows


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-", without its byte order mark.

    Raises:
      ConfigError: the file is missing, cannot be read, or is not UTF-8.
    """
    if path == STANDARD:
        return decode("standard input", sys.stdin.buffer.read())
    place = Path(path).expanduser()
    if "://" in path:
        raise ConfigError(f"{path}: only local files are read. Copy it here.")
    if not place.exists():
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
    if pointer := describe_lfs_pointer(place):
        raise ConfigError(pointer)
    return decode(path, data)


def _some(names: Sequence[str]) -> str:
    shown = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)[:5]
    return ", ".join(shown) if shown else "no such files" if names else ""


def decode(path: str, data: bytes) -> str:
    """The text of UTF-8 bytes, without the byte order mark.

    Raises:
      ConfigError: they are not UTF-8; `path` and the line are named.
    """
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


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end in \n, \r\n or, if there is no \n at all, in \r.

    >>> split_lines("a\r\nb\n"), split_lines("a\rb"), split_lines("")
    (['a', 'b'], ['a', 'b'], [])
    """
    lines = text.split("\n" if "\n" in text else "\r")
    lines = [line.removesuffix("\r") for line in lines]
    return lines if lines[-1] else lines[:-1]


# Tables -----------------------------------------------------------------------------------------


def _read_header(source: Source, config: FileTask) -> list[str]:
    """The names in the first line of what may be a table."""
    try:
        _, names = next(_read_records(source, config))
    except (ConfigError, StopIteration):
        return []
    return [name.strip() for name in names]


def _read_table(source: Source, config: FileTask) -> Iterator[Row]:
    records = _read_records(source, config)
    where, names = next(records)
    names = [name.strip() for name in names]
    same = [unicodedata.normalize("NFC", name) for name in names]
    twice = sorted({name for name in same if name and same.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: the header names {_quoted(twice)} twice: {_quoted(names)}.")
    for where, values in records:
        if len(values) != len(names):
            cure = _separator(names)
            cure = cure or " A field that holds the delimiter or a line break must be in quotes."
            if config.quote_char is None and any('"' in value for value in values):
                cure += " If quotes go on over tabs and line breaks, set QUOTE_CHAR = '\"'."
            raise ConfigError(
                f"{where}: found {len(values)} fields where the header has {len(names)} "
                f"({_quoted(names)}); the line begins {_short(values[0])}.{cure}"
            )
        yield Row(where, dict(zip(names, values, strict=True)), header=True)


def _read_records(source: Source, config: FileTask) -> Iterator[tuple[str, list[str]]]:
    """The place and the fields of every record; the first one is the header."""
    path, lines = source.name, list(io.StringIO(source.text, newline=""))
    usual = "\t" if source.form == "tsv" else ","
    delimiter, first = _find_delimiter(path, lines, config, usual)
    limit = csv.field_size_limit(sys.maxsize)  # of the whole program: put back below
    try:
        if delimiter == "\t" and config.quote_char is None:
            yield from _read_tsv(path, lines, first)
        else:
            yield from _read_csv(path, lines, first, config, delimiter)
    finally:
        csv.field_size_limit(limit)


def _find_delimiter(
    path: str, lines: Sequence[str], config: FileTask, usual: str
) -> tuple[str, int]:
    """The delimiter, and the number of lines before the header: 1 if Excel's `sep=;` is there."""
    named = re.fullmatch(r'"?sep=([^\r\n])"?[\r\n]*', lines[0] if lines else "")
    if named is None:
        return config.delimiter or usual, 0
    if config.delimiter not in ("", named[1]):
        raise ConfigError(
            f"{path}:1: the file says that {named[1]!r} separates its columns, and DELIMITER = "
            f"{config.delimiter!r}. Leave DELIMITER empty, or remove the line."
        )
    return named[1], 1


def _read_tsv(path: str, lines: Sequence[str], first: int) -> Iterator[tuple[str, list[str]]]:
    """The records of tab-separated lines: a line break always ends one.

    Quotes belong to the text, unless a line read with them has as many fields as the header.
    """
    count = None
    for number, line in enumerate(lines[first:], first + 1):
        if line := line.rstrip("\r\n"):
            values = line.split("\t")
            try:
                quoted = next(csv.reader([line], delimiter="\t", strict=True))
            except csv.Error:  # not balanced
                quoted = values
            if count in (None, len(quoted)):
                values = quoted
            count = count or len(values)
            yield f"{path}:{number}", values


def _read_csv(
    path: str, lines: Sequence[str], first: int, config: FileTask, delimiter: str
) -> Iterator[tuple[str, list[str]]]:
    style: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    quote = '"' if config.quote_char is None else config.quote_char
    style |= {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE, "quotechar": None}
    reader = csv.reader(lines[first:], **style)
    start, count = first, 0
    while True:
        where = f"{path}:{start + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = first + reader.line_num
            raise ConfigError(f"{where}: {_explain(error, where, last)}") from error
        end = first + reader.line_num
        if values:
            if end > start + 1:  # of the header its first line says how many fields there are
                fields = count or lines[start].count(delimiter) + 1
                _check_line_breaks(where, lines[start:end], delimiter, fields, config)
            count = count or len(values)
            yield where, values
        start = end


def _check_line_breaks(
    where: str, lines: Sequence[str], delimiter: str, count: int, config: FileTask
) -> None:
    """Checks the lines of one record for rows that a stray quote has joined.

    They are rows if each has `count` fields, as the header has, when quotes mean nothing. The
    commas of a text that was quoted on purpose hardly ever fall like that.

    Raises:
      ConfigError: they look like rows, and QUOTE_CHAR does not say that quotes are meant.
    """
    like = [bool(x.strip("\r\n")) and x.count(delimiter) + 1 == count for x in lines]
    joined = all(like) or (len(like) >= 5 and all(like[1:-1]))
    if not joined and not (count > 1 and any(like[1:-1])):
        return
    last = int(where.rpartition(":")[2]) + len(lines) - 1
    what = (
        f"{where}: a field that begins with a quote goes on to line {last}, over lines that look "
        f"like rows ({count} fields each)"
    )
    if joined and config.quote_char is None:
        raise ConfigError(
            f"{what}. If quotes are characters like any other, set QUOTE_CHAR = ''; if the line "
            "breaks belong to the field, set QUOTE_CHAR = '\"'."
        )
    _note(f"note: {what}; they are read as one field")


@functools.cache  # a file is read once for each split
def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def _read_json(path: str, text: str) -> Iterator[Row]:
    """The rows of an object a line, or of one list of them."""
    if text.lstrip().startswith("["):
        values = _parse(path, text)
        parsed = ((f"{path}, item {number}", value) for number, value in enumerate(values, 1))
    else:
        lines = ((f"{path}:{number}", line) for number, line in enumerate(split_lines(text), 1))
        parsed = ((where, _parse(where, line)) for where, line in lines if line.strip())
    for where, value in parsed:
        yield Row(where, _object(where, value))


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


def find_field(fields: Iterable[str], name: str) -> str | None:
    """The field of this name, or of one that only writes its accents in another way; or None."""
    if name in (fields := list(fields)):
        return name
    composed = unicodedata.normalize("NFC", name)
    return next((f for f in fields if unicodedata.normalize("NFC", f) == composed), None)


def value_of(row: Row, name: str, used_by: str) -> Any:
    """What a field holds.

    Raises:
      ConfigError: there is no such field; the nearest is named.
    """
    if (field := find_field(row.fields, name)) is not None:
        return row.fields[field]
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
