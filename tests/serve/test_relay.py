"""How rank 0 tells the others: messages of any size, and one step at which all of them stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from otil_xdit.serve.engine import Cancelled
from otil_xdit.serve.ranks.relay import LOOKAHEAD, PART_BYTES, Heartbeat, Relay
from otil_xdit.serve.ranks.steps import StepControl
from otil_xdit.serve.requests import ImageRequest, LoraChoice, Pixels
from otil_xdit.serve.wire import decode, encode

SECONDS = 10.0


@pytest.fixture
def store() -> Iterator[Any]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True)


def test_a_message_of_many_parts_arrives_and_is_forgotten(store: Any) -> None:
    first, second = Relay(store, 0, 2), Relay(store, 1, 2)
    large = bytes(range(256)) * (PART_BYTES // 256 * 2 + 1)
    keys = store.num_keys()
    for message in (large, b"", b"small"):
        first.publish(message)
        assert second.receive() == message
    second.hand_over(large)
    assert first.take_over(SECONDS) == large
    first.publish(b"next")
    second.receive()
    assert store.num_keys() - keys < 12, "what all ranks have read is deleted"


def test_a_rank_waits_for_work_as_long_as_it_takes(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otil_xdit.serve.ranks.relay.IDLE_WAIT", timedelta(seconds=0.1))
    first, second = Relay(store, 0, 2), Relay(store, 1, 2)
    threading.Timer(0.5, first.publish, [b"late"]).start()
    assert second.receive() == b"late"


@pytest.mark.parametrize("cancel_at", [0, 1, 4, 8, 9, 99])
def test_all_ranks_stop_after_the_same_step(store: Any, cancel_at: int) -> None:
    steps, asked = 12, threading.Event()
    if cancel_at == 0:
        asked.set()

    def rank(number: int) -> int:
        """Return the step after which a rank stops; 0 for none."""
        relay = Relay(store, number, 3)
        told: list[int] = []

        def on_step(step: int, steps: int) -> None:
            told.append(step)
            if step == cancel_at:
                asked.set()

        control = StepControl(relay, number == 0, asked.is_set, on_step, SECONDS)
        for step in range(1, steps + 1):
            try:
                control.after(step, steps)
            except Cancelled:
                return step
        assert number != 0 or told == list(range(1, steps + 1))
        return 0

    with ThreadPoolExecutor(3) as pool:
        stopped = list(pool.map(rank, range(3)))
    # It is noticed after the next step; a word of `LOOKAHEAD` steps ahead can no longer say that the last one is one.
    last = cancel_at + 1 + LOOKAHEAD
    assert set(stopped) == ({last} if last < steps else {0})


def test_a_rank_that_falls_silent_is_seen(store: Any) -> None:
    head, other = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    other.beat("layer mid_block at step 3")
    assert head.others()[1][1] == "layer mid_block at step 3"
    silent = [head.others()[1][0] for _ in range(3)]
    assert silent == sorted(silent) and silent[-1] > 0
    other.beat("layer up_blocks at step 3")
    assert head.others()[1][0] < silent[-1]


def test_a_request_survives_the_wire() -> None:
    pixels, mask = Pixels(2, 1, "RGB", b"abcdef"), Pixels(2, 1, "L", b"\x00\xff")
    request = ImageRequest(
        "ä", 2**60, "b", 2, 1, 4, 1.5, "euler", (LoraChoice("x", "/y", 0.5),), pixels, mask, 0.7, previews=2
    )
    values, blobs = request.to_wire()
    message, data = decode(encode({"requests": [values]}, blobs))
    assert ImageRequest.from_wire(message["requests"][0], data) == request
