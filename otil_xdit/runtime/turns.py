"""One generation at a time: the ranks' connections belong to the process, and threads would mix their messages up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A queue of callers; the first is at work, the others wait in the order in which they came.

    Ranks whose callers come in the same order serve them in the same order; where they do not, a pipeline's ranks find
    that they do not agree. A caller whose ranks do not answer is ended by its timeout, so nobody waits for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._callers: deque[object] = deque()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn of this caller, and keep it for the bracket."""
        caller = object()
        with self._changed:
            self._callers.append(caller)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._callers[0] is caller)
            yield
        finally:
            with self._changed:
                self._callers.remove(caller)
                self._changed.notify_all()


TURNS = Turns()
"""Of this process, as its connections are."""
