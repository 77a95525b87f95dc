"""SuperGLUE's official JSONL files as a TFDS directory, without a network.

Run before everything else, once (`t5x prepare-superglue`); afterwards `--tfds_data_dir` points at
the result. TFDS' own builder writes it, so rows, order and files are those of a download.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import release

VERSION = "1.0.2"  # that of the tasks: super_glue_<name>_v102


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """The result for one task; as a string, the line that the command prints."""

    task: str  # the configuration in TFDS
    directory: Path
    rows: dict[str, int]  # by split
    existed: bool  # the directory was there before and is unchanged
    files: release.Files

    def __str__(self) -> str:
        if self.existed:
            return f"{self.task}: {self.directory} is there already and was kept; delete it to redo"
        counts = ", ".join(f"{split} {n}" for split, n in self.rows.items())
        expected = release.file_names(self.task)
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
    target = Path(tfds_data_dir).expanduser()
    with release.open_release(jsonl_dir) as tasks:
        counts = {
            task: {split: len(release.read_keys(f, task, split)) for split, f in files.items()}
            for task, files in tasks.items()
        }
        prepared = []
        for task, files in tasks.items():
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


def _prepare(task: str, files: release.Files, target: Path, rows: dict[str, int]) -> PreparedTask:
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


def _local_builder(files: release.Files) -> Any:
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
