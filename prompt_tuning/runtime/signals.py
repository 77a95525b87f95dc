"""SIGTERM, Ctrl-C and a closed terminal: stops a command and saves its state.

`cli.py` handles the signals while a command runs. A signal raises `Stopped` at once, except in
`training/loop.py`, which postpones it to the end of a step and saves first. If a second signal
comes, or the main thread does not respond because it compiles, a background thread exits the
process. No file is damaged by that, because all files are written atomically.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP unless nohup ignores it
GRACE_SECONDS = 5.0  # for the main thread to respond, if there is nothing to save
SAVING_SECONDS = 25.0  # the same, if there is something to save; schedulers kill after 30
BURST_SECONDS = 0.3  # `timeout` and shells send one signal twice


class Stopped(KeyboardInterrupt):
    """Raised in the main thread after a signal; `saved` is a sentence on what is saved."""

    def __init__(self, signum: int, saved: str = "") -> None:
        self.signum = signum
        super().__init__(describe(signum, saved))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [str(self)]

    @property
    def exit_code(self) -> int:
        """The exit code by the shells' convention: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


def describe(signum: int, saved: str) -> str:
    """The message of a stopped command.

    >>> describe(signal.SIGINT, "Step 3 is saved.")
    'stopped by Ctrl-C. Step 3 is saved.'
    """
    name = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "a closed terminal (SIGHUP)"}.get(
        signal.Signals(signum), signal.Signals(signum).name
    )
    return f"stopped by {name}." + (f" {saved}" if saved else "")


class Watch:
    """The state of signal handling in this process."""

    def __init__(self, program: str = "") -> None:
        self.program = program
        self.requested: int | None = None  # the first signal
        self.describe_saved: Callable[[], str] = str  # a sentence on what is saved
        self.stderr = 2  # the descriptor that `exit` writes to; another one while 2 is redirected
        self.unsaved = False  # whether there are steps that are not saved yet
        self._postponed = 0

    def check(self) -> None:
        """Raises `Stopped` if a signal was received."""
        if self.requested is not None:
            raise Stopped(self.requested, self.describe_saved())

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """A block in which a signal only sets `requested`, for `check`."""
        self._postponed += 1
        try:
            yield
        finally:
            self._postponed -= 1

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """A block inside `postponed` in which a signal raises `Stopped` at once."""
        outer, self._postponed = self._postponed, 0
        try:
            self.check()
            yield
        finally:
            self._postponed = outer

    def receive(self, signum: int, frame: object) -> None:
        """The signal handler; Python runs it in the main thread, between two instructions."""
        del frame
        if self.requested is None:
            self.requested = signum
        if not self._postponed:
            self.check()

    def grace(self) -> float:
        """Seconds that the main thread may take to respond."""
        return SAVING_SECONDS if self.unsaved else GRACE_SECONDS

    def exit(self, signum: int, reason: str) -> None:
        """Exits the process from any thread, at once."""
        saved = self.describe_saved()
        text = f"{self.program}: {describe(signum, reason)} {saved}".rstrip() + "\n"
        with contextlib.suppress(OSError):
            os.write(self.stderr, text.encode())
        os._exit(128 + signum)


_current = Watch()  # without `handled`, as in a notebook, it receives no signals


def current() -> Watch:
    """The watch of the running command."""
    return _current


def exit_at_once() -> None:
    """Lets a signal exit the process without a traceback, until `handled` begins."""

    def leave(signum: int, frame: object) -> None:
        del frame
        with contextlib.suppress(OSError):
            os.write(2, f"t5x: {describe(signum, '')}\n".encode())
        os._exit(128 + signum)

    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, leave)


@contextlib.contextmanager
def handled(program: str, *, may_exit: bool = True) -> Iterator[Watch]:
    """Handles the signals until the block ends; in another than the main thread it does nothing.

    Without `may_exit` no signal exits the process, which is the user's: a notebook or a program.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield _current
        return
    watch = Watch(program)
    with contextlib.ExitStack() as stack:
        if may_exit:
            stack.enter_context(_followed(watch))
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                stack.callback(signal.signal, signum, signal.signal(signum, watch.receive))
        old_watch, _current = _current, watch
        try:
            yield watch
        finally:
            _current = old_watch


@contextlib.contextmanager
def _followed(watch: Watch) -> Iterator[None]:
    """A block in which a thread exits the process if the main thread does not respond."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The C handler writes each signal to the pipe, even while the main thread is in compiled code.
    old_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_follow, args=(watch, reading), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd, warn_on_full_buffer=False)
        os.close(writing)


def _follow(watch: Watch, reading: int) -> None:
    """Reads signals until the pipe is closed; exits if the main thread does not respond in time."""
    first, began = 0, 0.0
    while True:
        if first:
            left = began + watch.grace() - time.monotonic()
            if not select.select([reading], [], [], max(left, 0.0))[0]:
                reason = "The current operation did not finish in time; exited without saving it."
                watch.exit(first, reason)
        received = os.read(reading, 64)
        if not received:
            os.close(reading)
            return
        for signum in received:
            if signum not in SIGNALS:
                continue
            if not first:
                first, began = signum, time.monotonic()
            elif time.monotonic() - began > BURST_SECONDS:
                watch.exit(signum, "Exited at once, because of a second signal.")
