"""What nobody foresaw: one message, and the traceback in a file."""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import tempfile
import traceback

import prompt_tuning

_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "std::bad_alloc")


_CURES = {
    errno.ENOSPC: "Free some space, or write elsewhere",
    errno.EDQUOT: "Free some space, or write elsewhere",
    errno.EFBIG: "A limit on the size of files is set (`ulimit -f`): raise it, or write elsewhere",
    errno.EACCES: "Change its permissions, or give another place",
    errno.EPERM: "Change its permissions, or give another place",
    errno.EROFS: "It is mounted for reading only: give another place",
    errno.EIO: "The disk or its connection has failed: give another place",
    errno.ESTALE: "The network file system has lost it: mount it again, or give another place",
    errno.ENOTDIR: "Part of the path is a file: give another place",
    errno.ENAMETOOLONG: "Give a shorter path",
}


def describe_refusal(error: BaseException, *, continues: bool = True) -> str | None:
    """One message where there was no memory, space or permission; None for all else.

    `continues`: the command is one that goes on from what it has saved.
    """
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds a NUL character. Give the path without it."
    if _is_memory(error):
        return _describe_memory(error)
    if not isinstance(error, OSError) or error.errno not in _CURES:
        return None
    place = error.filename2 or error.filename
    where = f" ({os.fsdecode(place)})" if isinstance(place, (str, bytes)) else ""
    kept = "What was saved before is whole, and the same command continues from there."
    if not continues:
        kept = "What was there before is as it was."
    return f"{error.strerror}{where}. {_CURES[error.errno]}. {kept}"


def describe(error: BaseException) -> str:
    """One message on an exception that is no `ConfigError`; writes the traceback beside it."""
    said = f"{type(error).__name__}: {_first_line(error)}"
    kept = " ".join(getattr(error, "__notes__", ())) or (
        "What was saved before is whole, and the same command continues from there."
    )
    return f"unexpected error: {said}{_place(error)}. {kept}{_report(error)}"


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    of_disk = "No space left" in text  # TensorStore's RESOURCE_EXHAUSTED
    return isinstance(error, MemoryError) or (any(m in text for m in _MEMORY) and not of_disk)


def _describe_memory(error: BaseException) -> str:
    found = re.search(r"allocat\w* (\d+) bytes", str(error))
    asked = f": {int(found.group(1)) / 2**30:,.1f} GiB were asked for at once" if found else ""
    kept = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"there is not enough memory{asked}. Lower BATCH_SIZE, EVAL_BATCH_SIZE, NUM_DECODES or "
        f"TASK_FEATURE_LENGTHS, set DTYPE = 'bfloat16', or use more devices.{kept}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return lines[0][:300]


def _place(error: BaseException) -> str:
    """The innermost line that is not of an installed package: ours, or of the user's module."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and f.filename[0] != "<"]
    last = (own or frames or [None])[-1]
    return f" ({last.filename}, line {last.lineno})" if last else ""


def _report(error: BaseException) -> str:
    """A sentence that names the file of the traceback."""
    head = (
        f"prompt-tuning {prompt_tuning.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}\n{' '.join(sys.argv)}\n\n"
    )
    text = head + "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="t5x-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:  # nowhere to write: then it is shown after all
        return f" Its traceback:\n{text}"
    return f" The traceback, to be reported with the defect, is in {path}."
