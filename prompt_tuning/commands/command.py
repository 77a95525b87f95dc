"""What a command of `t5x` is; the other modules of this room hold the commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable

from prompt_tuning.runtime import signals


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its line in `--help`, its flags, and what it does.

    `run` takes the parsed flags and what was not understood of them, which is handed on to T5X
    where `--engine=t5x` says so, and returns the exit code.
    """

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that it writes before it reads its log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    noise = re.compile(
        rb"I\d{4} |WARNING: All log messages before absl::InitializeLog|E\d{4} .*call to cuInit"
    )
    sys.stderr.flush()
    stderr = os.dup(2)
    watch = signals.current()
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        watch.stderr = stderr  # a signal that cannot wait for the import is still answered
        try:
            import tensorflow

            # TensorFlow only reads data, and leaves accelerators to JAX. It looks for a GPU here,
            # and logs if the machine has none.
            with contextlib.suppress(RuntimeError):  # running already: too late to change
                tensorflow.config.set_visible_devices([], "GPU")
        finally:
            watch.stderr = 2
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            os.write(2, b"".join(line for line in log if not noise.match(line)))
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # what TFDS and seqio warn of, we say ourselves
