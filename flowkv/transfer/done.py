"""What threads of a transport hand to the thread that calls `poll`."""

import contextlib
import os
import queue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Done(Generic[Item]):
    """A queue with a file descriptor, `fileno`, that is readable while there is something in it."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.fileno = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, item: Item) -> None:
        self._items.put(item)
        self.wake()

    def wake(self) -> None:
        os.eventfd_write(self.fileno, 1)

    def take(self) -> list[Item]:
        """All that is in it. Never waits."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno)
        items = []
        while not self._items.empty():
            items.append(self._items.get())
        return items

    def close(self) -> None:
        os.close(self.fileno)
