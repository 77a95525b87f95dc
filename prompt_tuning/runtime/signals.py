"""SIGTERM, Ctrl-C and a closed terminal: a command that is asked to stop leaves in good order.

`cli.py` handles the signals for the length of a command. Where nothing could be lost the signal
raises `Stopped` at once; `training/loop.py` postpones it to the end of a step, saves, and raises it
then. A second signal, or a main thread that does not come back from a compilation, is answered by a
thread of its own: the process ends, which harms nothing, since every file appears whole or not at
all.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

# A closed terminal is left alone where nohup has said so.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 5.0  # for code that cannot be interrupted, while there is nothing to save
SAVING_SECONDS = 25.0  # while there is; schedulers kill after 30
BURST_SECONDS = 0.3  # `timeout` and shells send one signal twice


class Stopped(KeyboardInterrupt):
    """Raised in the main thread once a signal was received; `said` is what became of the work."""

    def __init__(self, signum: int, said: str = "") -> None:
        self.signum = signum
        self.said = said
        super().__init__(describe(signum, said))

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


def describe(signum: int, said: str) -> str:
    """The sentence that a stopped command ends with.

    >>> describe(signal.SIGINT, "Step 3 is saved.")
    'stopped by Ctrl-C. Step 3 is saved.'
    """
    name = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "a closed terminal (SIGHUP)"}.get(
        signal.Signals(signum), signal.Signals(signum).name
    )
    return f"stopped by {name}." + (f" {said}" if said else "")


class Watch:
    """What is known of signals in this process."""

    def __init__(self, program: str = "") -> None:
        self.program = program
        self.requested: int | None = None  # the first signal
        self.saved: Callable[[], str] = str  # what is safe by now, as a sentence
        self.stderr = 2  # where `leave` speaks, while that one is redirected
        self.unsaved = False  # whether waiting for the main thread would save more
        self._postponed = 0

    def check(self) -> None:
        """Raises `Stopped` if a signal was received."""
        if self.requested is not None:
            raise Stopped(self.requested, self.saved())

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Within it a signal only sets `requested`, for `check`."""
        self._postponed += 1
        try:
            yield
        finally:
            self._postponed -= 1

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within it, inside `postponed`, a signal raises `Stopped` again, at once."""
        held, self._postponed = self._postponed, 0
        try:
            self.check()
            yield
        finally:
            self._postponed = held

    def receive(self, signum: int, frame: object) -> None:
        """The handler; Python runs it in the main thread, between two of its instructions."""
        del frame
        if self.requested is None:
            self.requested = signum
        if not self._postponed:
            self.check()

    def grace(self) -> float:
        """Seconds that the main thread may take to leave by itself."""
        return SAVING_SECONDS if self.unsaved else GRACE_SECONDS

    def leave(self, signum: int, why: str) -> None:
        """Ends the process from any thread, without waiting for anything."""
        text = f"{self.program}: {describe(signum, why)} {self.saved()}".rstrip() + "\n"
        with contextlib.suppress(OSError):
            os.write(self.stderr, text.encode())
        os._exit(128 + signum)


_current = Watch()  # without `handled`, as in a notebook: it never receives anything


def current() -> Watch:
    """The watch of the running command."""
    return _current


def leave_at_once() -> None:
    """Lets a signal end the process without a traceback, until `handled` knows better."""

    def leave(signum: int, frame: object) -> None:
        del frame
        with contextlib.suppress(OSError):
            os.write(2, f"t5x: {describe(signum, '')}\n".encode())
        os._exit(128 + signum)

    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, leave)


@contextlib.contextmanager
def handled(program: str) -> Iterator[Watch]:
    """Handles the signals until the block ends; does nothing outside of the main thread."""
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield _current
        return
    watch = Watch(program)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The C handler writes each signal here, even while the main thread is in compiled code.
    old_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    taken = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    old_handlers = {signum: signal.signal(signum, watch.receive) for signum in taken}
    threading.Thread(target=_follow, args=(watch, reading), daemon=True).start()
    old_watch, _current = _current, watch
    try:
        yield watch
    finally:
        _current = old_watch
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(old_fd, warn_on_full_buffer=False)
        os.close(writing)


def _follow(watch: Watch, reading: int) -> None:
    """Reads signals until the writer is closed; after the first one, only for so long."""
    first, began = 0, 0.0
    while True:
        if first:
            left = began + watch.grace() - time.monotonic()
            if not select.select([reading], [], [], max(left, 0.0))[0]:
                watch.leave(first, "It was busy, and was left as it was.")
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
                watch.leave(signum, "Left at once, at the second signal.")
