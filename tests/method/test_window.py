"""The window: where it begins and ends, from the discrepancy of each step."""

from __future__ import annotations

import pytest

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.schedule import Schedule
from otil_xdit.method.window import PUBLISHED_DIT, PUBLISHED_UNET, Window, WindowSettings


def run(window: Window, curve: list[float], total: int | None = None) -> list[int]:
    """The steps that are in the window of a run with this curve."""
    window.begin()
    inside = []
    for step, discrepancy in enumerate(curve):
        if window.holds(step):
            inside.append(step)
        elif window.is_looked_for:
            window.record(step, discrepancy, total)
    return inside


def falling(steps: int, until: int, by: float = 0.01) -> list[float]:
    """A curve that falls by so much a step, and stays there."""
    return [1.0 - by * min(step, until) for step in range(steps)]


def test_it_begins_when_the_curve_has_stopped_falling() -> None:
    # Over the last 4 steps the curve falls by less than 0.004 in all from step 8 + 4 on: 12 is seen, 13 begins.
    window = Window(WindowSettings("auto", steps=3, slope=0.001, span=4, cap=40))
    assert run(window, falling(50, until=8), 50) == [13, 14, 15]
    assert window.found == (13, 16)


def test_a_rising_curve_is_not_a_low_one() -> None:
    window = Window(WindowSettings("auto", steps=2, slope=0.001, span=2, cap=9))
    assert run(window, [0.1 + 0.01 * step for step in range(20)], 20) == [9, 10], "the cap, as nothing else begins it"


def test_the_cap_begins_it_at_last() -> None:
    window = Window(WindowSettings("auto", steps=5, slope=1e-6, span=3, cap=7))
    assert run(window, falling(30, until=30), 30) == [7, 8, 9, 10, 11]


def test_it_is_found_anew_in_each_run() -> None:
    window = Window(WindowSettings("auto", steps=2, slope=0.001, span=2, cap=40))
    assert run(window, falling(30, until=3), 30) == [6, 7]
    assert run(window, falling(30, until=9), 30) == [12, 13]
    assert run(window, falling(30, until=3), 30) == [6, 7]


def test_no_steps_are_no_window() -> None:
    window = Window(WindowSettings("auto", steps=0, slope=0.001, span=2, cap=40))
    assert run(window, falling(20, until=3), 20) == []
    assert window.found == (6, 6), "where it would have begun is told all the same"


def test_a_given_window_is_not_looked_for() -> None:
    window = Window(WindowSettings("4:7"))
    assert run(window, [0.0] * 10) == [4, 5, 6]
    assert not window.is_looked_for


def test_published_thresholds_make_room_for_the_window() -> None:
    settings = WindowSettings("auto")
    assert settings.thresholds(True, 50) == PUBLISHED_UNET
    assert settings.thresholds(False, 50) == PUBLISHED_DIT
    assert settings.thresholds(True, 15).cap == 10
    assert settings.thresholds(False, 30).cap == 25
    assert settings.thresholds(True, 6).cap == 1
    assert WindowSettings("auto", cap=12).thresholds(True, 15).cap == 12, "a given one stays: check refuses it"


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        (WindowSettings("12:17"), 15, "window is '12:17', which a run of 15 steps has no room for"),
        (WindowSettings("auto", steps=15), 15, "window_steps is 15; in a run of 15 steps give at most 14"),
        (WindowSettings("auto", steps=5, cap=12), 15, "window_cap is 12.*give at most 10"),
    ],
)
def test_a_window_outside_the_steps_is_refused(settings: WindowSettings, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check(total)
    settings.check(50)


@pytest.mark.parametrize("text", ["0:5", "5:4", "5", "auto:3", "-1:4", "1:2:3", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="window is .*give auto, none, or FIRST:END"):
        OtilConfig(window=text)


def test_two_stages_without_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="two stages work in a window"):
        OtilConfig(requires_cfg_parallel=True)


@pytest.mark.parametrize("step", range(6))
def test_it_may_begin_where_it_does(step: int) -> None:
    """What the step before must keep is known before it is done: whenever the window begins, `may_begin_at` said so."""
    window = Window(WindowSettings("auto", steps=1, slope=0.02, span=1 + step % 3, cap=2 + step))
    window.begin()
    for now in range(10):
        may_begin = window.may_begin_at(now + 1, 10)
        window.record(now, 1 / (1 + now), 10)
        if window.found is not None:
            assert may_begin and window.found[0] == now + 1
            return
    pytest.fail("the cap begins it")


def test_outside_the_window_everything_is_synchronous() -> None:
    schedule = Schedule.from_config(OtilConfig(window="auto"))
    assert schedule.mode(9, 9, 15, window=False) == "sync"
    assert schedule.mode(9, 9, 15, window=True) == "displaced", "from its first step on, without waiting ones"
    assert schedule.mode(9, 0, 15, window=True) == "sync", "a layer that is new has nothing old to use"
