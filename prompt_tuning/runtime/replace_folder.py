"""Writing files and folders: atomic replacement, retries, and what errors mean.

A file or folder is written under a temporary name and then renamed, so it is never incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime import signals


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


# What the user can do about an error of writing.
CURES = {
    errno.ENOSPC: "Free some space, or choose another path",
    errno.EDQUOT: "Free some space, or choose another path",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`), or choose another path",
    errno.EACCES: "Change its permissions, or choose another path",
    errno.EPERM: "Change its permissions, or choose another path",
    errno.EROFS: "It is mounted read-only: choose another path",
    errno.EIO: "The disk or its connection has failed: choose another path",
    errno.ESTALE: "The network file system has lost it: mount it again, or choose another path",
    errno.ENOTDIR: "Part of the path is a file: choose another path",
    errno.ENAMETOOLONG: "Give a shorter path",
}
_OTHERS = (errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.ENOTEMPTY)
# Errors of a network file system or a full disk, which may be gone at the next attempt.
_TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.ENOTCONN, errno.EAGAIN}
    | {errno.ENOSPC, errno.EDQUOT}
)
SECONDS = (1.0, 2.0, 4.0, 8.0)  # waits between attempts


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
        is_refusal = error.errno in (*CURES, *_OTHERS)
        if not is_refusal or (opened and error.filename is not None):
            raise
        cure = CURES.get(error.errno or 0, "Choose another path")
        raise ConfigError(f"{what} cannot be written ({error.strerror}). {cure}.") from error


def write_with_retries(write: Callable[[], None], path: Path) -> None:
    """Calls `write` until it succeeds; `path` is for the messages.

    Raises:
      OSError: the last attempt failed, the reason is not transient, or a signal was received.
    """
    for seconds in SECONDS:
        try:
            return write()
        except OSError as error:
            if error.errno not in _TRANSIENT or signals.current().requested is not None:
                raise
            wait = f"trying again in {seconds:.0f} s"
            print(f"{path} cannot be written to ({error.strerror}): {wait}", flush=True)
            time.sleep(seconds)
    return write()


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
