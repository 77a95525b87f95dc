"""SuperGLUE's submission files: their lines, and checks of finished files.

There is one file of JSON lines a task, sorted, with `idx` and `label` in each line; MultiRC is
nested as its test set is. Booleans are words, in WSC with a capital. `submit.py` writes the files;
`check` reads them on its own.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import release
from prompt_tuning.tasks.release import COMMITMENT, ENTAILMENT, Key

Answers = Mapping[Key, Any]  # the label of each key


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """The format of one task's file."""

    name: str  # without .jsonl; also the task's folder in the SuperGLUE release
    labels: tuple[Any, ...]  # as they are written; () means any text
    rows: int  # keys of the official test set; for MultiRC its answers
    required: bool = True  # False for the diagnostics


FILES: Mapping[str, FileFormat] = MappingProxyType(
    {
        "boolq": FileFormat("BoolQ", ("false", "true"), 3_245),
        "cb": FileFormat("CB", COMMITMENT, 250),
        "copa": FileFormat("COPA", (0, 1), 500),
        "multirc": FileFormat("MultiRC", (0, 1), 9_693),
        "record": FileFormat("ReCoRD", (), 10_000),
        "rte": FileFormat("RTE", ENTAILMENT, 3_000),
        "wic": FileFormat("WiC", ("false", "true"), 1_400),
        "wsc": FileFormat("WSC", ("False", "True"), 146),
        "axb": FileFormat("AX-b", ENTAILMENT, 1_104, required=False),
        "axg": FileFormat("AX-g", ENTAILMENT, 356, required=False),
    }
)


def to_lines(task: str, answers: Answers) -> list[str]:
    """The lines of a task's file, sorted by idx."""
    if task != "multirc":
        rows = [{"idx": key[-1], "label": label} for key, label in sorted(answers.items())]
        return [json.dumps(row, ensure_ascii=False) for row in rows]
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for (passage, question, answer), label in sorted(answers.items()):
        labels = passages.setdefault(passage, {}).setdefault(question, [])
        labels.append({"idx": answer, "label": label})
    return [
        json.dumps(
            {
                "idx": passage,
                "passage": {
                    "questions": [{"idx": q, "answers": labels} for q, labels in questions.items()]
                },
            }
        )
        for passage, questions in passages.items()
    ]


def check(place: str | os.PathLike[str], jsonl_dir: str | os.PathLike[str] = "") -> list[str]:
    """A line on each file of a correct submission, a folder or a zip.

    With the official test files, folders or archives as `prepare-superglue` takes them, every idx
    in them must be answered, ReCoRD's with an entity of its row. Without them, only the number of
    answers is checked.

    Raises:
      ConfigError: the submission has errors; the message names every file and line.
    """
    files, problems = _read(Path(place).expanduser())
    expected = _read_test_keys(jsonl_dir) if jsonl_dir else None
    in_order, missing = [], []
    for task, form in FILES.items():
        file = f"{form.name}.jsonl"
        if file not in files and form.required:
            problems.append(f"{file}: missing")
        elif file not in files:
            missing.append(f"{file}: missing: it is a diagnostic, which the score does not count")
        elif expected is not None and task not in expected:
            problems.append(f"{file}: neither its test file nor {form.name}.zip is in --jsonl_dir")
        else:
            wrong = check_file(task, files[file], None if expected is None else expected[task])
            problems += [f"{file}: {problem}" for problem in wrong]
            in_order += [] if wrong else [f"{file}: in order"]
    known = {f"{form.name}.jsonl" for form in FILES.values()}
    problems += [f"{name}: no file of a submission" for name in sorted(set(files) - known)]
    if problems:
        text = "\n  ".join(problems + missing)
        raise ConfigError(f"the submission {place} has errors:\n  {text}")
    return in_order + missing


def check_file(
    task: str, data: bytes, expected: Mapping[Key, Sequence[str]] | None = None
) -> list[str]:
    """The problems of a task's file, at most 20.

    `expected` has the keys of the test set, each with the texts that may answer it; () where
    FILES has the labels.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return [f"line {line}: not UTF-8 ({error.reason}). Write the file in UTF-8."]
    form = FILES[task]
    problems: list[str] = []
    seen: dict[Key, int] = {}
    highest: Key = ()
    for number, line in enumerate(_lines(text), start=1):
        try:
            answers = list(_parse(task, line))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not a line of this file ({error})")
            continue
        for key, label in answers:
            words = form.labels or (expected or {}).get(key, ())
            if key in seen:
                problems.append(f"line {number}: idx {_show(key)} repeats line {seen[key]}")
            elif key < highest:
                shown = f"idx {_show(key)} comes after {_show(highest)}"
                problems.append(f"line {number}: {shown}. Sort the lines by idx")
            seen[key], highest = number, max(key, highest)
            if not _is_legal(words, label):
                wanted = ", ".join(map(repr, words[:5])) or "a text that is not empty"
                wanted = wanted if form.labels or not words else f"an entity of its row: {wanted}"
                problems.append(f"line {number}: label {reprlib.repr(label)}, expected {wanted}")
    if expected is None and len(seen) != form.rows:
        problems.append(f"{len(seen)} answers, expected {form.rows}")
    if expected is not None:
        problems += _describe_keys("not answered", set(expected) - set(seen))
        problems += _describe_keys("not of the test set", set(seen) - set(expected))
    return problems[:20]


def _lines(text: str) -> list[str]:
    """The lines between line feeds: JSON strings may contain other line ends (U+2028)."""
    return text.removesuffix("\n").split("\n") if text else []


def _describe_keys(what: str, keys: set[Key]) -> list[str]:
    shown = ", ".join(map(_show, sorted(keys)[:5]))
    return [f"{len(keys)} idx {what}: {shown}"] if keys else []


def _is_legal(words: Sequence[Any], label: Any) -> bool:
    if not words:
        return isinstance(label, str) and bool(label.strip())
    return any(label == wanted and type(label) is type(wanted) for wanted in words)


def _show(key: Key) -> str:
    return "/".join(map(str, key))


def _parse(task: str, line: str) -> Iterator[tuple[Key, Any]]:
    row = json.loads(line, object_pairs_hook=_object)
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    fields = release.Fields(row)
    if task != "multirc":
        _expect(fields, "idx", "label")
        yield (fields.whole("idx", or_text=task == "axb"),), row["label"]
        return
    _expect(fields, "idx", "passage")
    passage = fields.object("passage")
    _expect(passage, "questions")
    for question in passage.objects("questions"):
        _expect(question, "idx", "answers")
        for answer in question.objects("answers"):
            _expect(answer, "idx", "label")
            key = (fields.whole("idx"), question.whole("idx"), answer.whole("idx"))
            yield key, answer.values["label"]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each field of which stands there once: readers differ in which one counts."""
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the fields {repeated} are repeated")
    return dict(pairs)


def _expect(fields: release.Fields, *names: str) -> None:
    """Raises ValueError if these are not all fields of an object."""
    if set(fields.values) != set(names):
        where = f" of {fields.path!r}" if fields.path else ""
        raise ValueError(
            f"the fields{where} are {sorted(fields.values)}, expected {' and '.join(names)}"
        )


def _read_test_keys(
    jsonl_dir: str | os.PathLike[str],
) -> dict[str, dict[Key, tuple[str, ...]]]:
    """By task the keys of the official test file, of ReCoRD with the entities that may answer."""
    with release.open_release(jsonl_dir, ["test"]) as tasks:
        return {
            task: release.read_keys(files["test"], task, "test")
            for task, files in tasks.items()
            if task in FILES
        }


def _read(place: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a submission by name, and names that a zip has more than once as problems."""
    try:
        if place.is_dir():
            return {path.name: path.read_bytes() for path in sorted(place.glob("*.jsonl"))}, []
        with zipfile.ZipFile(place) as archive:
            names = collections.Counter(archive.namelist())
            repeated = [f"{name}: {n} files of this name" for name, n in names.items() if n > 1]
            return {name: archive.read(name) for name in names}, repeated
    except release.NOT_UNPACKED as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{place} is neither a folder nor a zip of a submission ({reason}). Give the folder or "
            "zip that `t5x submit-superglue` wrote."
        ) from error


def find_task(name: str) -> str:
    """The key in FILES of a seqio task; "" for any other task."""
    config = name.removeprefix("taskless_").removeprefix("super_glue_").split("_v102")[0]
    return config if config in FILES and "super_glue_" in name else ""
