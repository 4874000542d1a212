"""A reentrant lock that lets a waiting thread in before the one that has just left."""

from __future__ import annotations

import threading
from typing import Self


class FairLock:
    """A loop that takes it again at once would starve everyone else on a plain lock."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held while waiting: the next one to come queues behind
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        me = threading.get_ident()
        if self._owner != me:
            with self._turn:
                self._lock.acquire()
            self._owner = me
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
