"""SuperGLUE's official release: its folders or archives, its rows, and what a row must have.

Here is no TensorFlow: `prepare.py` makes a TFDS directory of these files, and the check of a
submission (`evaluation/submission_format.py`) reads what there is to answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import describe_lfs_pointer

# The files of a task's folder by the name of their split in TFDS; the first one there is taken.
# dev32.jsonl is the development set of few-shot releases such as FewGLUE.
FILES = MappingProxyType(
    {"train": ("train.jsonl",), "validation": ("val.jsonl", "dev32.jsonl"), "test": ("test.jsonl",)}
)
ENTAILMENT = ("entailment", "not_entailment")
COMMITMENT = ("entailment", "contradiction", "neutral")
# What may follow a pronoun within its word: something that is no letter, and what comes after it.
AFTER_PRONOUN = "(?s)([^0-9A-Za-z\u00c0-\u1fff].*)?"
NOT_UNPACKED = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


class File(NamedTuple):
    """One file of the release."""

    path: Path
    shown: str  # its name in messages: of an unpacked file, that in the archive


Files = Mapping[str, File]  # by split


@contextlib.contextmanager
def open_release(
    jsonl_dir: str | os.PathLike[str], splits: Sequence[str] = tuple(FILES)
) -> Iterator[Mapping[str, Files]]:
    """The files of these splits that are in `jsonl_dir`, by task and split.

    A task is a folder (`BoolQ/train.jsonl`, `val.jsonl`, `test.jsonl`), its archive (`BoolQ.zip`)
    or a folder within the archive of all tasks (`combined.zip`). What is unpacked is deleted at the
    end.

    Raises:
      ConfigError: there is no such file, or an archive cannot be unpacked.
    """
    source = Path(jsonl_dir).expanduser()
    with tempfile.TemporaryDirectory(prefix="superglue-") as unpacked:
        tasks = {task: _find(source, task, splits, Path(unpacked)) for task in RELEASE}
        tasks = {task: files for task, files in tasks.items() if files}
        if not tasks:
            names = ", ".join(dict.fromkeys(official.folder for official in RELEASE.values()))
            wanted = ", ".join(FILES[split][0] for split in splits)
            raise ConfigError(
                f"--jsonl_dir: none of the folders {names} with {wanted} is in {source}, and none "
                "of their archives (BoolQ.zip, or combined.zip). Give the folder into which the "
                "official SuperGLUE release was downloaded or unpacked."
            )
        yield tasks


def file_names(task: str) -> Mapping[str, tuple[str, ...]]:
    """The files of a task by split; the diagnostic sets have one file each."""
    folder = RELEASE[task].folder
    return {"test": (f"{folder}.jsonl",)} if folder.startswith("AX-") else FILES


def _find(source: Path, task: str, splits: Sequence[str], unpacked: Path) -> dict[str, File]:
    """The files of a task that are there, out of its folder or else of an archive."""
    folder = RELEASE[task].folder
    names = {split: files for split, files in file_names(task).items() if split in splits}
    there = {path.name.lower(): path for path in source.iterdir()} if source.is_dir() else {}
    place = shown = there.get(folder.lower())
    archive = there.get(f"{folder.lower()}.zip") or there.get("combined.zip")
    if (place is None or not place.is_dir()) and archive is not None:
        wanted = {name.lower() for files in names.values() for name in files}
        place, shown = _unpack(archive, folder, wanted, unpacked / folder), archive
    if place is None or not place.is_dir():
        return {}
    inside = {path.name.lower(): path for path in place.iterdir() if path.is_file()}
    chosen = {
        split: next((inside[name.lower()] for name in files if name.lower() in inside), None)
        for split, files in names.items()
    }
    return {split: File(path, f"{shown}/{path.name}") for split, path in chosen.items() if path}


def _unpack(archive: Path, folder: str, wanted: set[str], target: Path) -> Path:
    """Unpacks a task's files of these names into `target`, wherever in its own archive they lie."""
    if target.exists():
        return target
    own = archive.stem.lower() == folder.lower()
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                path = PurePosixPath(member.filename)
                if path.name.lower() in wanted and (
                    own or path.parent.name.lower() == folder.lower()
                ):
                    target.mkdir(parents=True, exist_ok=True)
                    (target / path.name).write_bytes(file.read(member))
    except NOT_UNPACKED as error:
        raise ConfigError(f"--jsonl_dir: {archive} cannot be unpacked: {error}.") from error
    return target


Key = tuple[int, ...]  # idx, or passage, question and answer


def read_keys(file: File, task: str, split: str) -> dict[Key, tuple[str, ...]]:
    """The keys of a file's examples, all rows of it as TFDS needs them; of ReCoRD with entities.

    Raises:
      ConfigError: a row is not as it should be; the message has file, line and field.
    """
    lines: dict[Key, int] = {}
    keys: dict[Key, tuple[str, ...]] = {}
    for line, row in _rows(file):
        try:
            for key, entities in RELEASE[task].check(row, split != "test"):
                if key in keys:
                    shown = key[0] if len(key) == 1 else key
                    raise ConfigError(f"the 'idx' {shown} is that of line {lines[key]} too.")
                lines[key], keys[key] = line, entities
        except ConfigError as error:
            raise ConfigError(f"{file.shown}, line {line}: {error}") from error
    if not keys:
        raise ConfigError(f"{file.shown} has no rows. Remove the file, or put rows into it.")
    return keys


def _rows(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, counted from 1."""
    for line, data in enumerate(file.path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(data.decode("utf-8"))  # bytes might be UTF-16, or begin with a mark
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
            where = f"{file.shown}, line {line}"
            pointer = describe_lfs_pointer(file.path)
            raise ConfigError(pointer or f"{where}: this is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{file.shown}, line {line}: a row must be a JSON object, found {row!r}."
            )
        yield line, row


# Rows of the release, in which some tasks are nested -------------------------------------------

Examples = Iterator[tuple[Key, tuple[str, ...]]]  # keys, each with the entities that may answer


@dataclasses.dataclass(frozen=True)
class Official:
    """One configuration of TFDS' `super_glue` as the release has it."""

    folder: str  # of the release; its archive is <folder>.zip
    check: Callable[[Any, bool], Examples]  # (row, labelled) -> its examples


class Fields:
    """The fields of a JSON object, each read as a type.

    Every method raises ConfigError if the field is missing or of another type.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        """`path` is where in the row the object stands."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the field {path!r} must be an object, found {values!r}.")
        self.values, self.path = values, path

    def _bad(self, name: str, wanted: str) -> ConfigError:
        value = self.values.get(name)
        return ConfigError(f"the field {self._where(name)!r} must be {wanted}, found {value!r}.")

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

    def whole(self, name: str, *, or_text: bool = False) -> int:
        """A field that is a whole number of 32 bits, or with `or_text` the digits of one."""
        value = self.values.get(name)
        if or_text and isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,9}", value):
            value = int(value)
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


def flat(
    texts: tuple[str, ...],
    labels: tuple[Any, ...],
    numbers: tuple[str, ...] = (),
    *,
    text_idx: bool = False,
) -> Any:
    """The check of rows that have these texts, numbers and labels, and perhaps a text as `idx`."""

    def check(row: Any, labelled: bool) -> Examples:
        fields = Fields(row)
        for name in texts:
            fields.text(name)
        for name in numbers:
            fields.whole(name)
        if labelled or "label" in fields.values:
            fields.label(labels)
        yield (fields.whole("idx", or_text=text_idx),), ()

    return check


def multirc(row: Any, labelled: bool) -> Examples:
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
            yield (index, question.whole("idx"), answer.whole("idx")), ()


def record(row: Any, labelled: bool) -> Examples:
    """A passage with marked entities and queries: one row for each query."""
    fields = Fields(row)
    passage = fields.object("passage")
    fields.whole("idx")
    text, entities = passage.text("text"), {}
    for entity in passage.objects("entities"):
        start, end = entity.whole("start"), entity.whole("end")
        if not 0 <= start <= end < len(text):
            raise ConfigError(
                f"the fields {entity.path + '.start'!r} and 'end' must be places in the text, "
                f"found {start} and {end}; the text has {len(text)} characters."
            )
        entities[text[start : end + 1]] = None
    for query in fields.objects("qas"):
        query.text("query")
        if labelled or "answers" in query.values:
            for answer in query.objects("answers"):
                answer.text("text")
        yield (query.whole("idx"),), tuple(entities)


def wsc(row: Any, labelled: bool) -> Examples:
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
    yield (fields.whole("idx"),), ()


def _is_pronoun(word: str, pronoun: str) -> bool:
    rest = word[len(pronoun) :]
    return word.startswith(pronoun) and re.fullmatch(AFTER_PRONOUN, rest) is not None


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
        "cb": Official("CB", flat(("premise", "hypothesis"), COMMITMENT)),
        "copa": Official(
            "COPA", flat(("premise", "choice1", "choice2", "question"), (0, 1, False, True))
        ),
        "multirc": Official("MultiRC", multirc),
        "record": Official("ReCoRD", record),
        "rte": Official("RTE", flat(("premise", "hypothesis"), ENTAILMENT)),
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
        # The release has "idx": "0" here, and numbers everywhere else.
        "axb": Official("AX-b", flat(("sentence1", "sentence2"), ENTAILMENT, text_idx=True)),
        "axg": Official("AX-g", flat(("premise", "hypothesis"), ENTAILMENT)),
    }
)
