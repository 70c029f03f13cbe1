"""`Restarts`: how often lost ranks are started again, and after what pause."""

from __future__ import annotations

LONGEST_PAUSE = 30.0
"""Seconds between two restarts at most; the first comes after one second, each next one after twice as many."""


class Restarts:
    """Losses of ranks in a row, and what follows from one more.

    Args:
        most: how many restarts in a row there may be.
    """

    def __init__(self, most: int) -> None:
        self._most, self._in_a_row = most, 0

    def next_pause(self) -> float | None:
        """Count a loss; return the seconds to wait before the restart, or None where it was one too many."""
        if self._in_a_row >= self._most:
            return None
        pause = min(2.0**self._in_a_row, LONGEST_PAUSE)
        self._in_a_row += 1
        return pause

    def count_anew(self) -> None:
        """Forget the losses: the ranks have shown since that they work."""
        self._in_a_row = 0
