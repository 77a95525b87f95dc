"""Atomic replacement of files and folders; all output of the project is written with it.

A file or folder is written under a temporary name and then renamed, so it is never incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning.config import ConfigError


def local_folder(path: str | os.PathLike[str], what: str) -> Path:
    """The absolute path of a folder to write to; `what` names it in the error.

    Raises:
      ConfigError: it is empty, or is in a bucket.
    """
    if not os.fspath(path).strip():
        raise ConfigError(f"{what} is empty. Give the path of a folder.")
    if "://" in os.fspath(path):
        raise ConfigError(
            f"{what} must be a local folder, found {os.fspath(path)}. Write locally, then copy it: "
            "`gsutil -m cp -r`."
        )
    return Path(path).expanduser().absolute()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_REFUSALS = (*_FULL, *_FORBIDDEN, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EEXIST)
_REFUSALS += (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTEMPTY)


@contextlib.contextmanager
def writing(what: str, *, opened: bool = False) -> Iterator[None]:
    """Turns an OSError of a block that only writes into a ConfigError; `what` names the output.

    If the block also reads, set `opened`: only errors of files that are already open, which name no
    path, are then turned.

    Raises:
      ConfigError: the disk is full, or the path cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS or (opened and error.filename is not None):
            raise
        cure = "Choose another path"
        if error.errno in _FULL:
            cure = "Free some space, or choose another path"
        elif error.errno in _FORBIDDEN:
            cure = "Change its permissions, or choose another path"
        raise ConfigError(f"{what} cannot be written ({error.strerror}). {cure}.") from error


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that replaces `path` when the block ends without an error.

    It is in the same parent folder, so that it can be renamed. An existing folder is moved aside
    before the rename and deleted afterwards. Temporary folders of a killed writer are deleted by
    the next one, so a folder must have a single writer at a time.

    Raises:
      ConfigError: `path` exists and is no folder, or is in a bucket.
    """
    path = local_folder(path, "the folder to write")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a folder to write to, found a file: {path}. Move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    new = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    old = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader sees the old text or the new one."""
    with replace_file(path) as new:
        new.write_bytes(text.encode("utf-8"))


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """The temporary path of a file that replaces `path` when the block ends without an error."""
    new = path.with_name(f".{path.name}.tmp")
    try:
        yield new
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
