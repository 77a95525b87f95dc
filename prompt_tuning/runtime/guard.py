"""A small parent for one process of several: when another one dies, it says so in a sentence.

JAX notices that a process is gone by its heartbeat, and ends the others by aborting them, with
nothing but C++ in their last lines. So the command runs in a child, and its parent, which uses no
JAX, passes signals on and translates the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

CHILD = "PROMPT_TUNING_GUARDED"  # set for the child
LOST = 75  # the exit code for "start it again": EX_TEMPFAIL of sysexits.h
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
# What JAX, Gloo and NCCL write when they cannot reach a process. Other errors of a device, such as
# too little memory, would come again.
_OF_CONNECTIONS = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|heartbeat|coordination|connect|\bpeer\b|gloo|"
    r"nccl|socket|timed? ?out",
    re.IGNORECASE,
)
_SAID = (
    "the connection to another process of the run was lost, so this one stopped as well. Start all "
    "processes again with the same command: the run goes on from its last saved state."
)
_OR_ABOVE = "the runtime gave up; if the lines above name no other reason,"


def is_child() -> bool:
    """Whether this process has a guard already."""
    return CHILD in os.environ


def run_guarded(name: str, arguments: Sequence[str]) -> int:
    """Runs the command line `arguments` in a child and returns its exit code, or `LOST`."""
    child = subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning.cli", *arguments],
        env={**os.environ, CHILD: str(os.getpid())},
    )
    before = {
        number: signal.signal(number, lambda received, _: child.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        return code
    if -code == signal.SIGABRT:  # what JAX's runtime does when a heartbeat is missed
        print(f"{name}: {_OR_ABOVE} {_SAID}", file=sys.stderr, flush=True)
        return LOST
    print(f"{name}: ended by {signal.Signals(-code).name}.", file=sys.stderr, flush=True)
    return 128 - code


def die_with_parent() -> None:
    """Asks the kernel to end this child when its guard is killed, so that nothing is left over."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(os.environ[CHILD]):  # killed before the line above
        os._exit(LOST)


def is_lost(error: BaseException) -> bool:
    """Whether the error is one of a connection to another process.

    >>> import jax
    >>> is_lost(jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: closed by peer"))
    True
    >>> is_lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    False
    """
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
        return False
    return _OF_CONNECTIONS.search(str(error)) is not None


def leave_if_lost(name: str, error: BaseException) -> None:
    """Ends this process at once if the error is one of a connection to another process.

    Not by the usual way: JAX would wait for the others at the end of the interpreter.
    """
    import jax

    if not is_lost(error) or jax.process_count() == 1:
        return
    reason = str(error).splitlines()[0][:200]
    print(f"{name}: {_SAID} ({reason})", file=sys.stderr, flush=True)
    os._exit(LOST)
