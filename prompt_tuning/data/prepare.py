"""The official SuperGLUE JSONL as a TFDS directory, without a network.

Run before everything else, once (`t5x prepare-superglue`); afterwards `--tfds_data_dir` points at
the result. TFDS' own builder writes it, so rows, order and files are those of a download.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.text.superglue import TASKS, TaskSpec, label_index

# The files of a task's folder, by the name of their split in TFDS.
FILES = MappingProxyType({"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"})


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """What became of one task; as a string, the line that the command prints."""

    task: str
    directory: Path
    rows: dict[str, int]  # by split
    kept: bool  # the directory was there before and has not been touched

    def __str__(self) -> str:
        if self.kept:
            return f"{self.task}: {self.directory} is there already and was kept; delete it to redo"
        counts = ", ".join(f"{split} {n}" for split, n in self.rows.items())
        missing = [FILES[split] for split in FILES if split not in self.rows]
        note = f" (no {', '.join(missing)}: skipped)" if missing else ""
        return f"{self.task}: {counts}{note} -> {self.directory}"


def prepare_superglue(
    jsonl_dir: str | os.PathLike[str], tfds_data_dir: str | os.PathLike[str]
) -> list[PreparedTask]:
    """Makes a TFDS directory from `<jsonl_dir>/<Task>/{train,val,test}.jsonl`, and says so.

    Tasks and splits that are not there are skipped. All rows are checked before anything is
    written, and every task appears under its final name only when it is complete.

    Raises:
      ConfigError: no task is there, a row is not as it should be (the message has file, line and
        field), or the directory cannot be written.
    """
    if "://" in str(tfds_data_dir):
        raise ConfigError(
            f"--tfds_data_dir: {tfds_data_dir} is not a local directory. Prepare the data locally "
            "and copy the directory there."
        )
    source, target = Path(jsonl_dir), Path(tfds_data_dir)
    folders = [spec for spec in TASKS.values() if _files(source, spec)]
    if not folders:
        names = ", ".join(f"{spec.folder}/train.jsonl" for spec in TASKS.values())
        raise ConfigError(
            f"--jsonl_dir: none of {names} (or val.jsonl, test.jsonl there) is in {source}. Give "
            "the folder into which the official SuperGLUE archives were unpacked."
        )
    counts = {
        spec.name: {split: _check(path, spec, split) for split, path in _files(source, spec)}
        for spec in folders
    }
    prepared = []
    for spec in folders:
        try:
            prepared.append(_prepare(spec, source, target, counts[spec.name]))
        except OSError as error:
            raise ConfigError(f"--tfds_data_dir: {target} cannot be written: {error}.") from error
        print(prepared[-1], flush=True)
    return prepared


def _files(source: Path, spec: TaskSpec) -> list[tuple[str, Path]]:
    """The splits of a task that are there."""
    paths = [(split, source / spec.folder / name) for split, name in FILES.items()]
    return [(split, path) for split, path in paths if path.is_file()]


def _check(path: Path, spec: TaskSpec, split: str) -> int:
    """How many rows a file has, all of them as the builder needs them."""
    seen: dict[int, int] = {}  # idx -> line
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        for feature in spec.features:
            if not isinstance(row.get(feature), str):
                raise ConfigError(
                    f"{where}: the field {feature!r} must be text, found {row.get(feature)!r}."
                )
        index = row.get("idx")
        if not isinstance(index, int) or isinstance(index, bool):
            raise ConfigError(f"{where}: the field 'idx' must be a whole number, found {index!r}.")
        if index in seen:
            raise ConfigError(f"{where}: the 'idx' {index} is that of line {seen[index]} too.")
        seen[index] = line
        if "label" in row or split != "test":  # the official test files have no labels
            _check_label(spec, row.get("label"), where)
    if not seen:
        raise ConfigError(f"{path} has no rows. Remove the file, or put rows into it.")
    return len(seen)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, counted from 1."""
    for line, data in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(data)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ConfigError(f"{path}, line {line}: this is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {line}: a row must be a JSON object, found {row!r}.")
        yield line, row


def _check_label(spec: TaskSpec, label: Any, where: str) -> None:
    try:
        fits = label_index(spec, label) >= 0
    except ConfigError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{where}: the field 'label' must be one of {', '.join(spec.labels)}, found {label!r}."
        )


def _prepare(spec: TaskSpec, source: Path, target: Path, rows: dict[str, int]) -> PreparedTask:
    version = "1.0.2"  # that of the tasks: super_glue_<name>_v102
    final = target / "super_glue" / spec.name / version
    if final.exists():
        return PreparedTask(spec.name, final, rows, kept=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=target) as staging:
        builder = _local_builder(source)(config=spec.name, version=version, data_dir=staging)
        with _silence():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        os.rename(builder.data_dir, final)
    return PreparedTask(spec.name, final, rows, kept=False)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps TFDS from speaking of a download, with five progress bars a task."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _local_builder(source: Path) -> Any:
    """TFDS' SuperGLUE builder, reading the unpacked archives in `source`."""

    class Unpacked:
        """Stands where TFDS has its download manager."""

        def download_and_extract(self, url: str) -> str:
            del url
            return str(source)

    base: Any = tfds.builder_cls("super_glue")

    class LocalSuperGlue(base, skip_registration=True):  # type: ignore[call-arg]
        name = "super_glue"

        def _split_generators(self, dl_manager: Any) -> list[Any]:
            del dl_manager
            generators = super()._split_generators(Unpacked())
            return [g for g in generators if os.path.exists(g.gen_kwargs["data_file"])]

    return LocalSuperGlue
