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
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prompt_tuning.config import ConfigError

Key = tuple[int, ...]  # idx, or passage, question and answer
Answers = Mapping[Key, Any]  # the label of each key


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """The format of one task's file."""

    name: str  # without .jsonl; also the task's folder in the SuperGLUE release
    labels: tuple[Any, ...]  # as they are written; () means any text
    rows: int  # keys of the official test set; for MultiRC its answers
    required: bool = True  # False for the diagnostics


_ENTAILMENT = ("entailment", "not_entailment")
FILES: Mapping[str, FileFormat] = MappingProxyType(
    {
        "boolq": FileFormat("BoolQ", ("false", "true"), 3_245),
        "cb": FileFormat("CB", ("entailment", "contradiction", "neutral"), 250),
        "copa": FileFormat("COPA", (0, 1), 500),
        "multirc": FileFormat("MultiRC", (0, 1), 9_693),
        "record": FileFormat("ReCoRD", (), 10_000),
        "rte": FileFormat("RTE", _ENTAILMENT, 3_000),
        "wic": FileFormat("WiC", ("false", "true"), 1_400),
        "wsc": FileFormat("WSC", ("False", "True"), 146),
        "axb": FileFormat("AX-b", _ENTAILMENT, 1_104, required=False),
        "axg": FileFormat("AX-g", _ENTAILMENT, 356, required=False),
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

    With the official test files (`<jsonl_dir>/<Task>/test.jsonl`), every idx in them must be
    answered. Without them, only the number of answers is checked.

    Raises:
      ConfigError: the submission has errors; the message names every file and line.
    """
    files = _read(Path(place).expanduser())
    notes, problems = [], []
    for task, form in FILES.items():
        file = f"{form.name}.jsonl"
        if file not in files:
            (problems if form.required else notes).append(f"{file}: missing")
            continue
        wrong = check_file(task, files[file], expected_keys(task, jsonl_dir) if jsonl_dir else None)
        problems += [f"{file}: {problem}" for problem in wrong]
        notes += [] if wrong else [f"{file}: in order"]
    known = {f"{form.name}.jsonl" for form in FILES.values()}
    problems += [f"{name}: no file of a submission" for name in sorted(set(files) - known)]
    if problems:
        text = "\n  ".join(problems)
        raise ConfigError(f"the submission {place} has errors:\n  {text}")
    return notes


def check_file(task: str, text: str, expected: set[Key] | None = None) -> list[str]:
    """The problems of a task's file, at most 20."""
    form = FILES[task]
    problems: list[str] = []
    seen: dict[Key, int] = {}
    for number, line in enumerate(_lines(text), start=1):
        try:
            answers = list(_parse(task, line))
        except (ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            problems.append(f"line {number}: not a line of this file ({kind}: {error})")
            continue
        for key, label in answers:
            if key in seen:
                problems.append(f"line {number}: idx {_show(key)} repeats line {seen[key]}")
            seen[key] = number
            if not _is_legal(form, label):
                wanted = ", ".join(map(repr, form.labels)) or "a text that is not empty"
                problems.append(f"line {number}: label {label!r}, expected {wanted}")
    if expected is None and len(seen) != form.rows:
        problems.append(f"{len(seen)} answers, expected {form.rows}")
    if expected is not None:
        problems += _describe_keys("not answered", expected - set(seen))
        problems += _describe_keys("not of the test set", set(seen) - expected)
    return problems[:20]


def _lines(text: str) -> list[str]:
    """The lines between line feeds: JSON strings may contain other line ends (U+2028)."""
    return text.removesuffix("\n").split("\n") if text else []


def _describe_keys(what: str, keys: set[Key]) -> list[str]:
    shown = ", ".join(map(_show, sorted(keys)[:5]))
    return [f"{len(keys)} idx {what}: {shown}"] if keys else []


def _is_legal(form: FileFormat, label: Any) -> bool:
    if not form.labels:
        return isinstance(label, str) and bool(label.strip())
    return any(label == wanted and type(label) is type(wanted) for wanted in form.labels)


def _show(key: Key) -> str:
    return "/".join(map(str, key))


def _parse(task: str, line: str) -> Iterator[tuple[Key, Any]]:
    row = json.loads(line)
    if task != "multirc":
        if set(row) != {"idx", "label"}:
            raise ValueError(f"the fields are {sorted(row)}, expected idx and label")
        yield (_whole(row["idx"]),), row["label"]
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            key = (_whole(row["idx"]), _whole(question["idx"]), _whole(answer["idx"]))
            yield key, answer["label"]


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"idx {value!r} is not a whole number")
    return value


def expected_keys(task: str, jsonl_dir: str | os.PathLike[str]) -> set[Key]:
    """The keys of a task's official test file.

    Raises:
      ConfigError: there is no such file, or it has another format.
    """
    form = FILES[task]
    folder = Path(jsonl_dir).expanduser() / form.name
    paths = [folder / name for name in ("test.jsonl", f"{form.name}.jsonl")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigError(f"--jsonl_dir: there is no test.jsonl in {folder}.")
    keys: collections.Counter[Key] = collections.Counter()
    try:
        for line in _lines(path.read_text(encoding="utf-8")):
            keys.update(_test_keys(task, json.loads(line)))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the test file of {form.name}: {error!r}.") from error
    return set(keys)


def _test_keys(task: str, row: Mapping[str, Any]) -> Sequence[Key]:
    if task == "record":
        return [(question["idx"],) for question in row["qas"]]
    if task != "multirc":
        return [(row["idx"],)]
    return [
        (row["idx"], question["idx"], answer["idx"])
        for question in row["passage"]["questions"]
        for answer in question["answers"]
    ]


def _read(place: Path) -> dict[str, str]:
    """The JSON-lines files of a folder or a zip, by name."""
    try:
        if place.is_dir():
            return {p.name: p.read_text(encoding="utf-8") for p in sorted(place.glob("*.jsonl"))}
        with zipfile.ZipFile(place) as archive:
            return {name: archive.read(name).decode("utf-8") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{place} is neither a folder nor a zip of a submission ({reason}). Give the folder or "
            "zip that `t5x submit-superglue` wrote."
        ) from error


def find_task(name: str) -> str:
    """The key in FILES of a seqio task; "" for any other task."""
    config = name.removeprefix("taskless_").removeprefix("super_glue_").split("_v102")[0]
    return config if config in FILES and "super_glue_" in name else ""
