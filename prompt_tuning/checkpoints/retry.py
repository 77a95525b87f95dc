"""Writes that fail for a reason that may pass are tried again for a little while.

A disk that others fill and free, a network file system that comes back. Longer than that nobody
waits: the run ends, and its state is saved elsewhere (`training/ending.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from prompt_tuning.checkpoints.run_state import MAY_PASS, SaveError
from prompt_tuning.runtime import signals

T = TypeVar("T")

SECONDS = (1.0, 2.0, 4.0, 8.0)


def retried(write: Callable[[], T], place: str | os.PathLike[str]) -> T:
    """What `write` returns, which may be called several times; a line says so each time.

    Raises:
      OSError, SaveError: it still fails, or a signal was received meanwhile.
    """
    for seconds in SECONDS:
        try:
            return write()
        except (OSError, SaveError) as error:
            passes = error.may_pass if isinstance(error, SaveError) else error.errno in MAY_PASS
            if not passes or signals.current().requested is not None:
                raise
            reason = getattr(error, "strerror", None) or error
            print(
                f"{os.fspath(place)} cannot be written to ({reason}): trying again in "
                f"{seconds:.0f} s",
                flush=True,
            )
            time.sleep(seconds)
    return write()
