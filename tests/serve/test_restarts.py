"""`Restarts`: pauses that double, and an end after too many in a row."""

from __future__ import annotations

from otil_xdit.serve.restarts import Restarts


def test_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(7)
    assert [restarts.next_pause() for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, None]


def test_a_working_life_counts_anew() -> None:
    restarts = Restarts(1)
    assert restarts.next_pause() == 1
    assert restarts.next_pause() is None
    restarts.count_anew()
    assert restarts.next_pause() == 1
