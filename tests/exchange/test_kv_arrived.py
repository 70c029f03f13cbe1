"""Payloads that copies follow late: which copies follow when, and before their bytes are written over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otil_xdit.exchange.kv_arrived import ArrivedPayloads
from otil_xdit.exchange.kv_kernels import ReadPayloads

LAYERS, RANKS, SIZE = 4, 2, 16


class Kernels:
    """Notes whose copies follow."""

    def __init__(self) -> None:
        self.followed: list[tuple[int, str]] = []

    def read(self, predictor: Any, run: slice, received: torch.Tensor) -> ReadPayloads:
        return ReadPayloads(received, (torch.zeros(run.stop - run.start, RANKS),))

    def advance(self, predictor: Any, run: slice, read: ReadPayloads, whose: str, own: int, writing: Any) -> None:
        self.followed.append((run.start, whose))

    def following(self, predictor: Any, read: ReadPayloads, own: int) -> dict[str, Any]:
        return {"received": read.received[own, 0]}


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def arrived() -> ArrivedPayloads:
    transform = SimpleNamespace(rank=1, writing=lambda layer, out: {"out": out})
    copies = SimpleNamespace(predictor=None)
    return ArrivedPayloads(transform, copies)  # type: ignore[arg-type]


def payloads(run: slice) -> torch.Tensor:
    return torch.arange(RANKS * (run.stop - run.start) * SIZE).view(RANKS, -1, SIZE)


def test_each_ranks_copies_follow_once(arrived: ArrivedPayloads, kernels: Kernels) -> None:
    run = slice(0, 2)
    arrived.take(run, payloads(run), kernels)
    assert arrived.follow_own(1)["received"].equal(payloads(run)[1, 1])
    assert arrived.follow_own(1) == {}
    assert arrived.write_predicted(1, torch.empty(0), {}) and not arrived.write_predicted(1, torch.empty(0), {})
    arrived.settle()
    assert kernels.followed == [(1, "others"), (0, "all")]


def test_own_copies_follow_at_the_next_call_of_a_layer_that_was_waited_for(
    arrived: ArrivedPayloads, kernels: Kernels
) -> None:
    run = slice(2, 3)
    arrived.take(run, payloads(run), kernels)
    arrived.write(2, torch.empty(0))
    assert kernels.followed == [(2, "others")]
    assert arrived.follow_own(2)["received"].equal(payloads(run)[1, 0])
    arrived.settle()
    assert kernels.followed == [(2, "others")]


def test_copies_follow_before_anything_is_written_to_where_their_payloads_lie(
    arrived: ArrivedPayloads, kernels: Kernels
) -> None:
    """Payloads of layers that came together lie rank by rank, so one layer's message goes to where several lie."""
    together, alone = slice(0, 3), slice(3, 4)
    arrived.take(together, payloads(together), kernels)
    arrived.take(alone, payloads(alone), kernels)
    arrived.settle(slice(1, 2))
    assert kernels.followed == [(0, "all"), (1, "all"), (2, "all")]
    arrived.settle(slice(3, 4))
    assert kernels.followed[3:] == [(3, "all")]
