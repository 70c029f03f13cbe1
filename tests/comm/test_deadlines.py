"""Deadlines of messages that the host does not wait for, and the end of all communicators at once; without a device."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from otil_xdit.comm import groups
from otil_xdit.comm.deadlines import Deadlines
from tests.comm.test_failure_detector import Ranks

SECONDS = 0.1


class Device:
    """How far a device is: stands for the event before a message and for the message."""

    def __init__(self, reached: bool = True, done: bool = False) -> None:
        self.reached, self.done = reached, done

    def query(self) -> bool:
        return self.reached

    def is_completed(self) -> bool:
        return self.done


def watched(deadlines: Deadlines, **devices: Device) -> None:
    for where, device in devices.items():
        deadlines.watch(where, device, [device])


def overdue_within(deadlines: Deadlines, seconds: float) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := deadlines.overdue()) is not None:
            return found
        time.sleep(0.01)
    return None


def test_the_oldest_unfinished_message_is_named() -> None:
    deadlines = Deadlines(SECONDS)
    watched(deadlines, first=Device(done=True), second=Device(), third=Device())
    assert overdue_within(deadlines, 5 * SECONDS) == "second"


def test_time_runs_from_when_the_device_gets_there() -> None:
    deadlines, device = Deadlines(SECONDS), Device(reached=False)
    watched(deadlines, late=device)
    assert overdue_within(deadlines, 3 * SECONDS) is None
    device.reached = True
    assert overdue_within(deadlines, 0.5 * SECONDS) is None
    assert overdue_within(deadlines, 3 * SECONDS) == "late"


def test_messages_that_arrive_are_never_overdue() -> None:
    deadlines, device = Deadlines(SECONDS), Device()
    watched(deadlines, soon=device)
    assert overdue_within(deadlines, 0.5 * SECONDS) is None
    device.done = True
    assert overdue_within(deadlines, 3 * SECONDS) is None
    watched(deadlines, forgotten=Device())
    deadlines.clear()
    assert overdue_within(deadlines, 3 * SECONDS) is None


def test_an_overdue_message_raises_the_alarm_on_every_rank_and_is_named() -> None:
    ranks = Ranks(2, timeout=SECONDS)
    ranks.begin()
    waiting, other = ranks.all
    try:
        waiting.on_collective("layer a at step 3")
        waiting.on_enqueued(Device(), [Device()])
        waiting.on_collective("layer b at step 3")  # enqueued, and as far from being reached as can be
        waiting.on_enqueued(Device(reached=False), [Device()])
        other.on_collective("layer a at step 2")
        end = time.monotonic() + 10
        while not (waiting.is_alarmed and other.is_alarmed) and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(ranks.severed) == [0, 1]
        found = ranks.at_once(waiting.diagnose, other.diagnose)
        assert "rank 0 waits for layer a at step 3" in found[1]
        assert "layer a at step 2" in found[0]
    finally:
        for one in ranks.all:
            one.close()


class Communicator:
    """Stands for NCCL's: its abort ends only once those of all others have begun."""

    def __init__(self, all_have_begun: threading.Barrier) -> None:
        self.aborted, self._all = False, all_have_begun

    def abort(self) -> None:
        self._all.wait(5)
        self.aborted = True


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")


def test_all_communicators_are_aborted_at_once(nccl: None) -> None:
    begun = threading.Barrier(3)
    communicators: list[Any] = [Communicator(begun) for _ in range(3)]
    groups.break_connections(communicators)
    assert all(one.aborted for one in communicators)


def test_an_abort_that_hangs_does_not_hold_up_the_message(nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "ABORT_SECONDS", 0.2)
    never: Any = Communicator(threading.Barrier(2))
    started = time.monotonic()
    groups.break_connections([never])
    assert time.monotonic() - started < 3 and not never.aborted


@pytest.mark.parametrize(("backend", "expected"), [("gloo", 5.0), ("nccl", groups.NCCL_SECONDS)])
def test_the_timeout_is_gloo_s_own_and_never_nccl_s(
    backend: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[timedelta] = []
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda time, group: given.append(time))
    nobody: Any = object()
    groups.limit_waits([nobody], 5.0)
    assert given == [timedelta(seconds=expected)]
