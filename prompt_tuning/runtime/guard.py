"""A guard for each of several processes: explains the end of a process whose connection was lost.

JAX notices a dead process by its heartbeat and then aborts the others, with C++ output alone. So
the command runs in a child. The guard, its parent, does not use JAX; it forwards signals and
translates the child's exit.
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

CHILD = "PROMPT_TUNING_GUARDED"  # environment variable that is set for the child
LOST = 75  # exit code for an error that a restart may solve: EX_TEMPFAIL of sysexits.h
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
# Messages of JAX, Gloo and NCCL if they cannot reach a process. Other errors of a device, such as
# too little memory, would recur after a restart.
_CONNECTION_ERRORS = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|heartbeat|coordination|connect|\bpeer\b|gloo|"
    r"nccl|socket|timed? ?out",
    re.IGNORECASE,
)
_LOST_MESSAGE = (
    "the connection to another process of the run was lost, so this one stopped as well. Start all "
    "processes again with the same command: the run is resumed from its newest saved state."
)
_ABORTED = "the runtime aborted; if the lines above name no other reason,"


def is_child() -> bool:
    """Whether this process is the child of a guard."""
    return CHILD in os.environ


def run_guarded(name: str, arguments: Sequence[str]) -> int:
    """The exit code of the command line `arguments`, run in a child; `LOST` if it was aborted."""
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
    if -code == signal.SIGABRT:  # JAX's runtime aborts if a heartbeat is missed
        print(f"{name}: {_ABORTED} {_LOST_MESSAGE}", file=sys.stderr, flush=True)
        return LOST
    print(f"{name}: ended by {signal.Signals(-code).name}.", file=sys.stderr, flush=True)
    return 128 - code


def die_with_parent() -> None:
    """Asks the kernel to kill this child if its guard is killed."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(os.environ[CHILD]):  # the guard was killed before the line above
        os._exit(LOST)


def is_lost(error: BaseException) -> bool:
    """Whether the error is about the connection to another process.

    >>> import jax
    >>> is_lost(jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: closed by peer"))
    True
    >>> is_lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    False
    """
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
        return False
    return _CONNECTION_ERRORS.search(str(error)) is not None


def exit_if_lost(name: str, error: BaseException) -> None:
    """Exits at once if the error is one of a connection to another process.

    At a normal exit JAX would wait for the other processes.
    """
    import jax

    if not is_lost(error) or jax.process_count() == 1:
        return
    reason = str(error).splitlines()[0][:200]
    print(f"{name}: {_LOST_MESSAGE} ({reason})", file=sys.stderr, flush=True)
    os._exit(LOST)
