"""Work that runs ahead of who needs it: an iterator that a thread goes through in the background.

A backbone is read while TensorFlow is imported and the rows are tokenised; the next batches are
made while the device computes. Items come in the order of the iterator, and so does its error: it
is raised where the item would have been.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

ItemT = TypeVar("ItemT")
BATCHES = 2  # that are made ahead of a step: one to be computed next, one that is being made


class Ahead(Generic[ItemT]):
    """The items of an iterator, made by a thread, `most` of them at most before they are asked for.

    At the end of its `with` the thread is gone, as soon as it has made the item that it is at: none
    is left to meet the end of the interpreter.
    """

    def __init__(self, items: Iterator[ItemT], *, most: int = sys.maxsize) -> None:
        """Starts the thread."""
        self._ready: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._room = threading.Semaphore(most)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[ItemT]) -> None:
        try:
            while self._room.acquire() and not self._stopped:
                self._ready.put(("item", next(items)))
        except StopIteration:
            self._ready.put(("end", None))
        except BaseException as error:  # the user's interrupts go to the main thread
            self._ready.put(("error", error))

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        kind, value = self._ready.get()
        if kind == "item":
            self._room.release()
            return value
        self._ready.put((kind, value))  # for whoever asks again
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; what it has made and nobody has asked for is dropped."""
        self._stopped = True
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Ahead[ItemT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
