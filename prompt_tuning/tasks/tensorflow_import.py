"""Imports TensorFlow, which reads rows, without its messages; before anything that imports it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile

from prompt_tuning.runtime import signals


def import_tensorflow() -> None:
    """Imports TensorFlow and hides the lines that it writes before it reads its log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    noise = re.compile(
        rb"I\d{4} |WARNING: All log messages before absl::InitializeLog|E\d{4} .*call to cuInit"
    )
    sys.stderr.flush()
    stderr = os.dup(2)
    watch = signals.current()
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        watch.stderr = stderr  # the message on a signal during the import is still shown
        try:
            import tensorflow

            # TensorFlow only reads data; accelerators are JAX's. It looks for a GPU here, and logs
            # an error if there is none.
            with contextlib.suppress(RuntimeError):  # TensorFlow was used before: too late
                tensorflow.config.set_visible_devices([], "GPU")
        finally:
            watch.stderr = 2
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            os.write(2, b"".join(line for line in log if not noise.match(line)))
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # warnings of TFDS and seqio repeat our own messages
