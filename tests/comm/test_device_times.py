"""Spans of the device's time between events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from otil_xdit.comm.device_times import EVERY, FIRST, DeviceTimes


class Event:
    """An event of a device whose clock each mark moves on by 10 ms."""

    now = 0.0

    def __init__(self, **_: Any) -> None:
        self.at = -1.0

    def record(self) -> None:
        Event.now += 10.0
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at > 0, "an event that was recorded"

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_some_steps_are_timed_and_spans_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    times, timed = DeviceTimes(), []
    for step in range(FIRST + EVERY + 1):
        if times.is_timing:
            timed.append(step)
            began = times.mark()
            waiting = times.mark()
            times.add("waited", waiting)
            times.add("exchange", began)
        times.after_step(step)
    assert timed == [FIRST, FIRST + EVERY] and times.steps == 2
    assert times.seconds("waited") == pytest.approx(2 * 0.010)
    assert times.seconds("exchange") == pytest.approx(2 * 0.030), "with the waiting in it"
    times.clear()
    assert times.seconds("waited") is None and not times.is_timing
