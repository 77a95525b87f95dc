"""Unexpected errors: one message, and the traceback in a file.

`cli.py` calls these for every exception that is no `ConfigError`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import traceback

import prompt_tuning
from prompt_tuning.runtime.replace_folder import CURES

RESUMABLE = "The saved states are complete, and the same command continues from the newest."
_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "std::bad_alloc")


def describe_refusal(error: BaseException, *, continues: bool = True) -> str | None:
    """A message on missing memory, disk space or permission; None for any other error.

    `continues` is whether the command can be resumed from its saved state.
    """
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path contains a NUL character. Give the path without it."
    if _is_memory(error):
        return _describe_memory(error)
    if not isinstance(error, OSError) or error.errno not in CURES:
        return None
    place = error.filename2 or error.filename
    where = f" ({os.fsdecode(place)})" if isinstance(place, (str, bytes)) else ""
    saved = RESUMABLE if continues else "Existing files are unchanged."
    return f"{error.strerror}{where}. {CURES[error.errno]}. {saved}"


def describe(error: BaseException) -> str:
    """A message on an exception that is no `ConfigError`; writes the traceback to a file."""
    summary = f"{type(error).__name__}: {_first_line(error)}"
    saved = " ".join(getattr(error, "__notes__", ())) or RESUMABLE
    return f"unexpected error: {summary}{_place(error)}. {saved}{_report(error)}"


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    is_disk = "No space left" in text  # TensorStore's RESOURCE_EXHAUSTED
    return isinstance(error, MemoryError) or (any(m in text for m in _MEMORY) and not is_disk)


def _describe_memory(error: BaseException) -> str:
    match = re.search(r"allocat\w* (\d+) bytes", str(error))
    request = f" for an array of {int(match.group(1)) / 2**30:,.1f} GiB" if match else ""
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"there is not enough memory{request}. Lower BATCH_SIZE, EVAL_BATCH_SIZE, NUM_DECODES or "
        f"TASK_FEATURE_LENGTHS, set DTYPE = 'bfloat16', or use more devices.{notes}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return lines[0][:300]


def _place(error: BaseException) -> str:
    """The innermost line outside of installed packages: in this project or the user's module."""
    frames = traceback.extract_tb(error.__traceback__)
    local = [f for f in frames if "site-packages" not in f.filename and f.filename[0] != "<"]
    last = (local or frames or [None])[-1]
    return f" ({last.filename}, line {last.lineno})" if last else ""


def _report(error: BaseException) -> str:
    """A sentence with the path of the traceback, which it writes to a temporary file."""
    head = (
        f"prompt-tuning {prompt_tuning.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}\n{' '.join(sys.argv)}\n\n"
    )
    text = head + "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="t5x-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:  # no file can be written: show it
        return f" Its traceback:\n{text}"
    return f" The traceback is in {path}. Attach it when you report the defect."
