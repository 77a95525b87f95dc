"""SuperGLUE's official JSONL files as a TFDS directory, without a network.

Run before everything else, once (`t5x prepare-superglue`); afterwards `--tfds_data_dir` points at
the result. TFDS' own builder writes it, so rows, order and files are those of a download.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import superglue

VERSION = "1.0.2"  # that of the tasks: super_glue_<name>_v102
# The files of a task's folder by the name of their split in TFDS; the first one there is taken.
# dev32.jsonl is the development set of few-shot releases such as FewGLUE.
FILES = MappingProxyType(
    {"train": ("train.jsonl",), "validation": ("val.jsonl", "dev32.jsonl"), "test": ("test.jsonl",)}
)


class File(NamedTuple):
    """One file of the release."""

    path: Path
    shown: str  # its name in messages: of an unpacked file, that in the archive


Files = Mapping[str, File]  # by split


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """The result for one task; as a string, the line that the command prints."""

    task: str  # the configuration in TFDS
    directory: Path
    rows: dict[str, int]  # by split
    existed: bool  # the directory was there before and is unchanged
    files: Files

    def __str__(self) -> str:
        if self.existed:
            return f"{self.task}: {self.directory} is there already and was kept; delete it to redo"
        counts = ", ".join(f"{split} {n}" for split, n in self.rows.items())
        expected = _names(self.task)
        missing = [names[0] for split, names in expected.items() if split not in self.rows]
        notes = [f"no {', '.join(missing)}: skipped"] if missing else []
        for split, file in self.files.items():
            if file.path.name.lower() != expected[split][0].lower():
                notes.append(f"{split} is {file.path.name}")
        note = f" ({'; '.join(notes)})" if notes else ""
        return f"{self.task}: {counts}{note} -> {self.directory}"


def prepare_superglue(
    jsonl_dir: str | os.PathLike[str], tfds_data_dir: str | os.PathLike[str]
) -> list[PreparedTask]:
    """Writes a TFDS directory of the release in `jsonl_dir`; returns what it has prepared.

    A task is a folder (`BoolQ/train.jsonl`, `val.jsonl`, `test.jsonl`) or the archive of it
    (`BoolQ.zip`). Tasks and splits that are not there are skipped. All rows are checked before
    anything is written, and every task appears under its final name only when it is complete.

    Raises:
      ConfigError: no task is there, a row is not as it should be (the message has file, line and
        field), or the directory cannot be written.
    """
    if "://" in str(tfds_data_dir):
        raise ConfigError(
            f"--tfds_data_dir: {tfds_data_dir} is not a local directory. Prepare the data locally "
            "and copy the directory there."
        )
    source, target = Path(jsonl_dir).expanduser(), Path(tfds_data_dir).expanduser()
    with tempfile.TemporaryDirectory(prefix="superglue-") as unpacked:
        release = {task: _find(source, task, Path(unpacked)) for task in RELEASE}
        release = {task: files for task, files in release.items() if files}
        if not release:
            names = ", ".join(dict.fromkeys(official.folder for official in RELEASE.values()))
            raise ConfigError(
                f"--jsonl_dir: none of the folders {names} with a train.jsonl, val.jsonl or "
                f"test.jsonl is in {source}, and none of their archives (BoolQ.zip). Give the "
                "folder into which the official SuperGLUE release was downloaded or unpacked."
            )
        counts = {
            task: {split: _check(file, task, split) for split, file in files.items()}
            for task, files in release.items()
        }
        prepared = []
        for task, files in release.items():
            try:
                prepared.append(_prepare(task, files, target, counts[task]))
            except OSError as error:
                message = (
                    f"--tfds_data_dir: {target} cannot be written ({error.strerror or error}): "
                    "free some space, or give another place."
                )
                raise ConfigError(message) from error
            print(prepared[-1], flush=True)
    return prepared


def _names(task: str) -> Mapping[str, tuple[str, ...]]:
    """The files of a task by split; the diagnostic sets have one file each."""
    folder = RELEASE[task].folder
    return {"test": (f"{folder}.jsonl",)} if folder.startswith("AX-") else FILES


def _find(source: Path, task: str, unpacked: Path) -> dict[str, File]:
    """The files of a task that are there, out of its folder or else of its archive."""
    folder = RELEASE[task].folder
    there = {path.name.lower(): path for path in source.iterdir()} if source.is_dir() else {}
    place = shown = there.get(folder.lower())
    archive = there.get(f"{folder.lower()}.zip")
    if (place is None or not place.is_dir()) and archive is not None:
        place, shown = _unpack(archive, unpacked / folder), archive
    if place is None or not place.is_dir():
        return {}
    inside = {path.name.lower(): path for path in place.iterdir() if path.is_file()}
    chosen = {
        split: next((inside[name.lower()] for name in names if name.lower() in inside), None)
        for split, names in _names(task).items()
    }
    return {split: File(path, f"{shown}/{path.name}") for split, path in chosen.items() if path}


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the JSONL files of an archive, wherever in it they lie, into `folder`."""
    if folder.exists():
        return folder
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                name = Path(member.filename).name
                if name.lower().endswith(".jsonl") and not name.startswith("._"):
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(file.read(member))
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ConfigError(f"--jsonl_dir: {archive} cannot be unpacked: {error}.") from error
    return folder


def _check(file: File, task: str, split: str) -> int:
    """How many examples a file has, all rows of it as the builder needs them."""
    seen: dict[Any, int] = {}  # key -> line
    for line, row in _rows(file):
        try:
            for key in RELEASE[task].check(row, split != "test"):
                if key in seen:
                    raise ConfigError(f"the 'idx' {key} is that of line {seen[key]} too.")
                seen[key] = line
        except ConfigError as error:
            raise ConfigError(f"{file.shown}, line {line}: {error}") from error
    if not seen:
        raise ConfigError(f"{file.shown} has no rows. Remove the file, or put rows into it.")
    return len(seen)


def _rows(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, counted from 1."""
    for line, data in enumerate(file.path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(data.decode("utf-8"))  # bytes might be UTF-16, or begin with a mark
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
            where = f"{file.shown}, line {line}"
            raise ConfigError(f"{where}: this is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{file.shown}, line {line}: a row must be a JSON object, found {row!r}."
            )
        yield line, row


def _prepare(task: str, files: Files, target: Path, rows: dict[str, int]) -> PreparedTask:
    final = target / "super_glue" / task / VERSION
    if final.exists():
        return PreparedTask(task, final, rows, existed=True, files=files)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=target) as staging:
        builder = _local_builder(files)(config=task, version=VERSION, data_dir=staging)
        with _silence():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        os.rename(builder.data_dir, final)
    return PreparedTask(task, final, rows, existed=False, files=files)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps TFDS from speaking of a download, with five progress bars a task."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _local_builder(files: Files) -> Any:
    """TFDS' SuperGLUE builder, reading these files."""
    base: Any = tfds.builder_cls("super_glue")

    class LocalSuperGlue(base, skip_registration=True):  # type: ignore[call-arg]
        name = "super_glue"

        def _split_generators(self, dl_manager: Any) -> list[Any]:
            del dl_manager
            return [
                tfds.core.SplitGenerator(
                    name=split, gen_kwargs={"data_file": str(file.path), "split": split}
                )
                for split, file in files.items()
            ]

    return LocalSuperGlue


# Rows of the release, in which some tasks are nested -------------------------------------------

Key = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Official:
    """One configuration of TFDS' `super_glue` as the release has it."""

    folder: str  # of the release; its archive is <folder>.zip
    check: Callable[[Any, bool], Iterator[Key]]  # (row, labelled) -> the keys of its examples


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

    def whole(self, name: str) -> int:
        """A field that is a whole number of 32 bits."""
        value = self.values.get(name)
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


def flat(texts: tuple[str, ...], labels: tuple[Any, ...], numbers: tuple[str, ...] = ()) -> Any:
    """The check of rows that have these texts, numbers and labels."""

    def check(row: Any, labelled: bool) -> Iterator[Key]:
        fields = Fields(row)
        for name in texts:
            fields.text(name)
        for name in numbers:
            fields.whole(name)
        if labelled or "label" in fields.values:
            fields.label(labels)
        yield fields.whole("idx")

    return check


def multirc(row: Any, labelled: bool) -> Iterator[Key]:
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
            yield index, question.whole("idx"), answer.whole("idx")


def record(row: Any, labelled: bool) -> Iterator[Key]:
    """A passage with marked entities and queries: one row for each query."""
    fields = Fields(row)
    passage = fields.object("passage")
    fields.whole("idx")
    text = passage.text("text")
    for entity in passage.objects("entities"):
        start, end = entity.whole("start"), entity.whole("end")
        if not 0 <= start <= end < len(text):
            raise ConfigError(
                f"the fields {entity.path + '.start'!r} and 'end' must be places in the text, "
                f"found {start} and {end}; the text has {len(text)} characters."
            )
    for query in fields.objects("qas"):
        query.text("query")
        if labelled or "answers" in query.values:
            for answer in query.objects("answers"):
                answer.text("text")
        yield query.whole("idx")


def wsc(row: Any, labelled: bool) -> Iterator[Key]:
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
    yield fields.whole("idx")


def _is_pronoun(word: str, pronoun: str) -> bool:
    rest = word[len(pronoun) :]
    return word.startswith(pronoun) and re.fullmatch(superglue.AFTER_PRONOUN, rest) is not None


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
        "cb": Official("CB", flat(("premise", "hypothesis"), superglue.CB.labels)),
        "copa": Official(
            "COPA", flat(("premise", "choice1", "choice2", "question"), (0, 1, False, True))
        ),
        "multirc": Official("MultiRC", multirc),
        "record": Official("ReCoRD", record),
        "rte": Official("RTE", flat(("premise", "hypothesis"), superglue.ENTAILMENT)),
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
        "axb": Official("AX-b", flat(("sentence1", "sentence2"), superglue.ENTAILMENT)),
        "axg": Official("AX-g", flat(("premise", "hypothesis"), superglue.ENTAILMENT)),
    }
)
