"""Prefetching: a thread that runs an iterator ahead of its consumer.

The backbone is read while TensorFlow is imported and the rows are tokenised. The next batches are
made while the device computes. The order of items is that of the iterator; its error is raised in
place of the item that failed.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

ItemT = TypeVar("ItemT")
BATCHES = 2  # prefetched batches: one that is ready, and one that is being made


class Prefetcher(Generic[ItemT]):
    """The items of an iterator, made by a thread; at most `most` of them ahead of the consumer.

    At the end of its `with` block the thread has ended: it finishes at most the current item.
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
        except BaseException as error:  # signals are received by the main thread
            self._ready.put(("error", error))

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        kind, value = self._ready.get()
        if kind == "item":
            self._room.release()
            return value
        self._ready.put((kind, value))  # for the next call
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; items that were not consumed are dropped."""
        self._stopped = True
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Prefetcher[ItemT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
