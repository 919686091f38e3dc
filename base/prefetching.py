"""Prefetching: a background thread prepares the next items while the caller processes the current one.

    for batch in prefetch(make_batches()):      # batch k + 1 is prepared while the model trains on batch k

Closing the iterator stops the thread.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
END = object()  # sentinel


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Iterate over items, up to `depth` of which are produced in advance. Exceptions are passed on to the caller."""
    ready: queue.Queue = queue.Queue(depth)
    stopping = threading.Event()

    def put(item: object, error: BaseException | None = None) -> None:
        while not stopping.is_set():  # a blocking put() would hang if the caller stops iterating
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopping.is_set():
                    return
            put(END)
        except BaseException as error:  # raised again in the caller's thread
            put(END, error)

    worker = threading.Thread(target=produce, daemon=True)
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item
    finally:
        stopping.set()
        worker.join()
