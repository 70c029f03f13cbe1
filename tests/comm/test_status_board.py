"""The board in torchrun's kind of store: quiet while the others have not come."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from otil_xdit.comm.status_board import StatusBoard


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=10))


@pytest.fixture
def board(store: TCPStore) -> Iterator[StatusBoard]:
    made = StatusBoard("s", "g", (0, 1), 0, store, lambda store: None, 10.0)
    made.begin()
    yield made
    made.close()


def test_waiting_for_a_late_rank_writes_nothing(board: StatusBoard, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert board.facts() is None
    assert time.monotonic() - began >= 0.2, "it waits for a poll's time"
    assert capfd.readouterr().err == "", "torch warns of a timeout that is none"


def test_facts_are_seen_soon_after_they_come(board: StatusBoard, store: TCPStore) -> None:
    come: list[float] = []

    def post() -> None:
        come.append(time.monotonic())
        store.set("otil/s/1/1/facts", json.dumps({"steps": "3"}))

    threading.Timer(0.05, post).start()
    assert board.facts() == {1: {"steps": "3"}}
    assert time.monotonic() - come[0] < 0.1
