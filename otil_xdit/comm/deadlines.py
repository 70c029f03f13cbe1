"""`Deadlines`: how long messages take that the host does not wait for.

NCCL's own timeout counts from the moment in which the host enqueues a message, which may be a whole step before the
device gets there, and ends the process without a word of layer or step. So the messages of a rank are kept in order,
and the time of the oldest one runs from when the device has reached it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Reached(Protocol):
    """What is used of a `torch.cuda.Event`."""

    def query(self) -> bool: ...


class Transfer(Protocol):
    """What is used of a `torch.distributed.Work`."""

    def is_completed(self) -> bool: ...


@dataclass
class _Watched:
    where: str
    reached: Reached
    works: Sequence[Transfer]
    since: float | None = None


class Deadlines:
    """The messages of one rank that are under way, oldest first.

    `watch` and `clear` are called by the thread that sends, `overdue` by one that looks now and then.

    Args:
        seconds: that a message may take once the device has reached it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched: deque[_Watched] = deque()

    def watch(self, where: str, reached: Reached, works: Sequence[Transfer]) -> None:
        """Take note of a message that has been enqueued.

        Args:
            where: its place, "layer ... at step ...".
            reached: recorded on the stream that the message waits for, before it was enqueued.
            works: of the message.
        """
        self._watched.append(_Watched(where, reached, works))

    def clear(self) -> None:
        """Forget all messages."""
        self._watched.clear()

    def overdue(self) -> str | None:
        """Return the place of the oldest message where it has taken too long; None where none has."""
        while self._watched:
            oldest = self._watched[0]
            if all(work.is_completed() for work in oldest.works):
                self._watched.popleft()
            elif not oldest.reached.query():
                return None
            elif oldest.since is None:
                oldest.since = time.monotonic()
                return None
            else:
                return oldest.where if time.monotonic() - oldest.since > self._seconds else None
        return None
