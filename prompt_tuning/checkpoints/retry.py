"""Retries writes that fail for a transient reason, such as a full disk or a network file system.

If the last attempt fails too, the run ends and saves its state elsewhere (`training/ending.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from prompt_tuning.checkpoints.run_state import TRANSIENT, SaveError
from prompt_tuning.runtime import signals

T = TypeVar("T")

SECONDS = (1.0, 2.0, 4.0, 8.0)  # waits between attempts


def write_with_retries(write: Callable[[], T], path: str | os.PathLike[str]) -> T:
    """The result of `write`, which is called until it succeeds; `path` is for the messages.

    Raises:
      OSError, SaveError: the last attempt failed, the reason is not transient, or a signal was
        received.
    """
    for seconds in SECONDS:
        try:
            return write()
        except (OSError, SaveError) as error:
            is_transient = (
                error.is_transient if isinstance(error, SaveError) else error.errno in TRANSIENT
            )
            if not is_transient or signals.current().requested is not None:
                raise
            reason = getattr(error, "strerror", None) or error
            print(
                f"{os.fspath(path)} cannot be written to ({reason}): trying again in "
                f"{seconds:.0f} s",
                flush=True,
            )
            time.sleep(seconds)
    return write()
