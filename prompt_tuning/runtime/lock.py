"""A lock on a folder: only one run at a time writes to a MODEL_DIR.

The operating system releases the lock when the process ends, even if it is killed. The lock file
contains the process that holds it, for the error message.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning.config import ConfigError

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextlib.contextmanager
def hold(folder: Path, what: str) -> Iterator[None]:
    """Locks `folder` until the block ends; `what` names it in errors.

    Raises:
      ConfigError: another run has locked it, or it cannot be written to.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{what} {folder} cannot be written to ({error.strerror}). Choose another, or change "
            "its permissions."
        ) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        _lock(file.fileno(), path, what)
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with contextlib.suppress(OSError):  # a full disk: the lock works without its contents
            file.truncate(0)
            file.seek(0)
            file.write(json.dumps(holder).encode())
        yield


def _lock(descriptor: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:  # some network file systems have no locks
            return
        raise ConfigError(
            f"{what} {path.parent} is in use by another run ({_describe(path)}). Wait until it "
            "ends, stop it, or choose another folder."
        ) from error


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} is unreadable"
