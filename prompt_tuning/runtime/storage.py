"""Folders on a local disk or in Google Cloud Storage, read through TensorStore.

`checkpoints/` reads both kinds of storage with the same code. Every failure becomes a ConfigError
that names the path.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tensorstore as ts

from prompt_tuning.config import ConfigError

ValueT = TypeVar("ValueT")

# TensorStore's exceptions for a missing, damaged or unreachable array.
STORAGE_ERRORS = (ValueError, OSError, RuntimeError, NotImplementedError, MemoryError)
# For reads of the index: an unreachable bucket is reported within seconds.
_PROBE = ts.Context({"gcs_request_retries": {"max_retries": 3, "max_delay": "1s"}})
LIST_SECONDS = 10.0
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder: `bucket` is None on a local disk; `path` is absolute, without a final slash."""

    path: str
    bucket: str | None = None

    @property
    def url(self) -> str:
        """The path or gs:// address of the folder."""
        return self.path if self.bucket is None else f"gs://{self.bucket}/{self.path}"

    def spec(self, name: str = "") -> dict[str, Any]:
        """TensorStore's key-value spec of the folder, or of its subfolder `name`."""
        path = "/".join(part for part in (self.path, name) if part)
        if self.bucket is None:
            return {"driver": "file", "path": f"{path}/"}
        return {"driver": "gcs", "bucket": self.bucket, "path": f"{path}/" if path else ""}

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if there is no such file.

        Raises:
          ConfigError: it cannot be read.
        """

        def fetch() -> bytes | None:
            store = ts.KvStore.open(self.spec(), context=_PROBE).result()
            read = store.read(name).result()
            return read.value if read.state == "value" else None

        return explain(fetch, self, f"{self.url}/{name}")

    def numbered(self, prefix: str) -> list[str]:
        """The names of the subfolders `<prefix><number>`, in order of their numbers.

        It is for error messages: if the bucket is too large or cannot be listed, it returns [].
        """
        last = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        try:
            store = ts.KvStore.open(self.spec(), context=_PROBE).result()
            keys = store.list(ts.KvStore.KeyRange(prefix, last)).result(timeout=LIST_SECONDS)
        except STORAGE_ERRORS:  # a TimeoutError is an OSError
            return []
        pattern = re.compile(rf"{re.escape(prefix)}(\d+)/")
        numbers = {int(m.group(1)) for key in keys if (m := pattern.match(key.decode()))}
        return [f"{prefix}{number}" for number in sorted(numbers)]


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder of a local path or a `gs://bucket/path`.

    Raises:
      ConfigError: the path is empty, or has another scheme.
    """
    text = os.fspath(path)
    if match := re.fullmatch(r"gs://([^/]+)/*(.*?)/*", text):
        return Folder(path=match.group(2), bucket=match.group(1))
    if not text or re.match(r"[a-z][a-z0-9+.-]+://", text):
        raise ConfigError(
            f"expected a local path or gs://bucket/path, found {text!r}. Copy the checkpoint to "
            "a local folder and give that."
        )
    return Folder(path=os.path.abspath(os.path.expanduser(text)))


def explain(action: Callable[[], ValueT], folder: Folder, what: str) -> ValueT:
    """The result of `action`, which reads `what` from `folder` with TensorStore.

    Raises:
      ConfigError: TensorStore failed; names what was read, the reason, and a remedy.
    """
    try:
        return action()
    except ConfigError:
        raise
    except STORAGE_ERRORS as error:
        pointer = folder.bucket is None and describe_lfs_pointer(folder.path)
        raise ConfigError(
            pointer or f"cannot read {what}: {reason_of(error)}. {_cure(folder, error)}"
        ) from error


def describe_lfs_pointer(path: str | os.PathLike[str]) -> str:
    """A message that names the first Git LFS pointer at a path, a local file or folder; else "".

    A repository that was cloned without Git LFS has these few lines of text in place of each large
    file. Readers ask here once a file could not be read; of a folder, its files and those one level
    below are looked at.
    """
    place = Path(path)
    for file in itertools.chain([place], sorted(place.glob("*")), sorted(place.glob("*/*"))):
        try:
            # Its format allows 1024 bytes.
            is_pointer = file.is_file() and file.stat().st_size <= 1024
            is_pointer = is_pointer and file.read_bytes().startswith(_LFS_POINTER)
        except OSError:  # the reader's own error is about that
            continue
        if is_pointer:
            return (
                f"{file} is a pointer of Git LFS, not the file itself: its repository was cloned "
                "without the large files. Run `git lfs pull` there, or copy the file itself."
            )
    return ""


def reason_of(error: Exception) -> str:
    """The message of a library's error, without specs, source lines and names of types."""
    text = re.split(
        r" \[(?:tensorstore_spec|source locations|http_response|curl_code)=", str(error)
    )
    message = re.sub(r"\b[A-Z][A-Za-z]*(?:Error|Exception): ", "", text[0])
    message = re.sub(r"^[A-Z_]{4,}: ", "", " ".join(message.split()))
    return message.rstrip(". ") or "unknown reason"


def _cure(folder: Folder, error: Exception) -> str:
    text = str(error)
    if re.search("NOT_FOUND|is missing|Not enough data|Invalid JSON|DATA_LOSS|decod", text):
        return "The checkpoint is damaged, or was copied incompletely: copy it again."
    if folder.bucket is None:
        return "Check the path, its permissions, and that the checkpoint was copied whole."
    return (
        "Check that this machine can reach Google Cloud Storage and read this bucket. Otherwise "
        f"copy the checkpoint on a machine that can, `gsutil -m cp -r {folder.url} .`, and give "
        "the local folder."
    )
