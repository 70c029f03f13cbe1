"""Callers of one process wait for each other: their images are those that they make alone, on all ranks."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from otil_xdit.errors import PipelineBusyError
from otil_xdit.runtime.turns import Turns
from tests.support.torchrun import lines_of


def test_threads_make_what_they_make_alone() -> None:
    lines = {line["way"]: line["ranks"] for line in lines_of(2, "threads.py")}
    assert set(lines) == {"one pipeline", "two pipelines", "copies"}
    for way, ranks in lines.items():
        assert ranks == [[True] * 3] * 2, way


def test_callers_are_served_in_the_order_in_which_they_came() -> None:
    turns, served, threads = Turns(), list[int](), list[threading.Thread]()
    with turns.take("Pipe", 10):
        for number in range(5):
            queued = len(turns._callers)
            threads.append(threading.Thread(target=lambda number=number: served_in(turns, served, number)))
            threads[-1].start()
            while len(turns._callers) == queued:
                pass
        assert not served
    for thread in threads:
        thread.join(10)
    assert served == [*range(5)]


def test_a_caller_that_raises_ends_its_turn() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.take("Pipe", 10):
        raise KeyError
    with turns.take("Pipe", 10):
        pass


def test_a_caller_that_waits_too_long_names_who_is_at_work() -> None:
    turns = Turns()
    with turns.take("First", 10):
        with (
            pytest.raises(PipelineBusyError, match=r"this call of Second waited 0\.1 s for a call of First"),
            turns.take("Second", 0.1),
        ):
            pass
        assert len(turns._callers) == 1, "it is out of the queue"


@pytest.fixture(scope="module")
def line() -> dict[str, Any]:
    """What two ranks saw whose calls do not fit."""
    (found,) = lines_of(2, "order.py")
    return found


def test_pipelines_called_in_different_order_are_refused_and_nothing_breaks(line: dict[str, Any]) -> None:
    assert line["first"] == [
        [True, "ValueError: rank 0: rank 1 refuses: rank 0 waits in a call of another pipeline"],
        [True, "PipelineBusyError: rank 0 waits in a call of another pipeline"],
    ]
    assert line["seconds"] < 20 and line["afterwards"] == [[True, True]] * 2


def test_a_call_that_one_rank_makes_late_or_not_at_all_is_refused_and_the_next_is_served(line: dict[str, Any]) -> None:
    missing = "rank 1 did not come to this call within 1 s: busy with something else, dead or stopped"
    alone, late = f"PipelineBusyError: rank 0: {missing}", f"PipelineBusyError: rank 1: {missing}"
    assert line["missed"] == [[alone, True, alone, True], [f"{late}; this rank has come since", True, True]]


def served_in(turns: Turns, served: list[int], number: int) -> None:
    with turns.take("Pipe", 10):
        served.append(number)
