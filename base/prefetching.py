"""Work ahead: an iterator whose items a background thread makes while the caller uses those before."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
END = object()


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, up to `depth` of them made ahead; what making them raises is raised here."""
    made: queue.Queue = queue.Queue(depth)
    stopping = threading.Event()

    def put(item: object, error: BaseException | None = None) -> None:
        while not stopping.is_set():
            with contextlib.suppress(queue.Full):
                made.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopping.is_set():
                    return
            put(END)
        except BaseException as error:  # the caller's to handle
            put(END, error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item
    finally:
        stopping.set()
        worker.join()
