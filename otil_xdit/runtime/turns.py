"""One generation at a time: the ranks' connections belong to the process, and threads would mix their messages up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from otil_xdit.errors import PipelineBusyError

TURN_TIMEOUTS = 12
"""How many times ``--otil_timeout`` a caller waits for its turn: an hour with the default, as images may be many."""


class _Caller:
    """Somebody who waits for a turn, or has it; told apart by identity."""

    def __init__(self, name: str) -> None:
        self.name = name


class Turns:
    """A queue of callers; the first is at work, the others wait in the order in which they came.

    Ranks whose callers come in the same order serve them in the same order; where they do not, the failure detector
    refuses a call before anything is sent. Who is at work for too long makes the next ones give up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._callers: deque[_Caller] = deque()

    @contextmanager
    def take(self, name: str, seconds: float) -> Iterator[None]:
        """Wait for the turn of this caller, and keep it for the bracket.

        Args:
            name: of the caller, for those who wait behind it.
            seconds: how long to wait at most.

        Raises:
            PipelineBusyError: when the turn does not come; it names who has it.
        """
        caller = _Caller(name)
        with self._changed:
            self._callers.append(caller)
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._callers[0] is caller, min(seconds, threading.TIMEOUT_MAX)):
                    raise PipelineBusyError(
                        f"this call of {name} waited {seconds:g} s for a call of {self._callers[0].name} to end, which "
                        "is still under way; nothing was begun: call again, or give a larger --otil_timeout"
                    )
            yield
        finally:
            with self._changed:
                self._callers.remove(caller)
                self._changed.notify_all()


TURNS = Turns()
"""Of this process, as its connections are."""
