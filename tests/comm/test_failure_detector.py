"""What ranks tell each other about failures; here all in one process, round one store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from otil_xdit.comm import failure_detector as detector
from otil_xdit.comm import store as store_module
from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.errors import ExchangeTimeout, NotFinite


class Ranks:
    """Some detectors round one store, and who has broken its connections."""

    def __init__(self, count: int, timeout: float = 10.0, store: Any = None) -> None:
        self.severed: list[int] = []
        store = dist.HashStore() if store is None else store
        self.all = [
            FailureDetector(
                "name", "groups", range(count), rank, timeout, store, "rank 0", partial(self.severed.append, rank)
            )
            for rank in range(count)
        ]
        self.pool = ThreadPoolExecutor(count)

    def begin(self) -> None:
        for one in self.all:
            one.begin()

    def at_once(self, *calls: Any) -> list[Any]:
        """What the calls give, made at the same time."""
        return [future.result(20) for future in [self.pool.submit(call) for call in calls]]


@pytest.fixture
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    ranks.begin()
    yield ranks
    for one in ranks.all:
        one.close()


def failing(rank: FailureDetector, error: Exception | None = None) -> Any:
    return lambda: rank.failed(error or ValueError("boom"))


def test_all_facts_reach_all(two: Ranks) -> None:
    first, second = two.all
    found = two.at_once(lambda: first.exchange_facts({"a": "1"}), lambda: second.exchange_facts({"a": "2"}))
    assert found == [{0: {"a": "1"}, 1: {"a": "2"}}] * 2


def test_facts_of_an_interrupted_generation_are_not_those_of_the_next(two: Ranks) -> None:
    first, second = two.all
    two.at_once(lambda: first.exchange_facts({"a": "0"}), lambda: second.exchange_facts({"a": "old"}))
    two.at_once(failing(first), failing(second))
    two.begin()
    found = two.at_once(lambda: first.exchange_facts({"a": "1"}), lambda: second.exchange_facts({"a": "new"}))
    assert found[0][1] == {"a": "new"}


def test_a_rank_that_fails_alone_breaks_the_connections_and_is_named(two: Ranks) -> None:
    first, second = two.all
    second.on_collective("layer x at step 3")
    alone = two.pool.submit(failing(second))
    while not first.is_alarmed:
        time.sleep(0.01)
    assert set(two.severed) == {0, 1}, "whoever waits would wait for the timeout"
    assert first.diagnose() == "rank 1 failed: ValueError: boom (after layer x at step 3)"
    alone.result(10)
    for one in two.all:
        with pytest.raises(ExchangeTimeout, match="earlier generation .*boom.* start all processes again"):
            one.begin()


def test_ranks_that_fail_alike_go_on(two: Ranks) -> None:
    started = time.monotonic()
    two.at_once(*map(failing, two.all))
    assert time.monotonic() - started < detector.GRACE_SECONDS and not two.severed
    two.begin()


def test_ranks_that_fail_at_different_places_do_not(two: Ranks) -> None:
    two.all[0].on_collective("layer x at step 3")
    two.at_once(*map(failing, two.all))
    assert set(two.severed) == {0, 1} and all(one.why_broken for one in two.all)


def test_ranks_in_two_stages_fail_alike_though_their_messages_were_others(two: Ranks) -> None:
    two.all[0].on_collective("layer x at step 3")
    for one in two.all:
        one.on_collective("the output at step 3")
    two.at_once(*map(failing, two.all))
    assert not two.severed


def test_the_same_message_begun_once_more_is_another_place(two: Ranks) -> None:
    first, second = two.all
    for one in (first, second, second):
        one.on_collective("layer x at step 3")
    two.at_once(*map(failing, two.all))
    assert set(two.severed) == {0, 1}


def test_a_rank_may_fail_when_the_others_are_done(two: Ranks) -> None:
    two.all[0].done()
    two.all[1].failed(ValueError("boom"))
    assert not two.severed
    two.begin()


def test_who_says_nothing_is_named_and_who_computes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "ANSWER_SECONDS", 0.6)
    ranks = Ranks(3)
    first, _, computing = ranks.all
    first.begin()
    computing.begin()
    computing.on_collective("layer y at step 2")
    started = time.monotonic()
    verdict = first.diagnose()
    assert "rank 1 says nothing" in verdict and "rank 2" not in verdict
    assert time.monotonic() - started < 5 and 2 in ranks.severed


def test_an_alarm_of_the_last_generation_is_none_of_this(two: Ranks) -> None:
    first, second = two.all
    alone = two.pool.submit(failing(second))
    while not first.is_alarmed:
        time.sleep(0.01)
    first.done()
    alone.result(10)
    first.begin()
    assert not first.is_alarmed


class Gone:
    """A store whose keeper has died."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("connection refused")

        if name == "clone":
            raise AttributeError
        return fail


class Stopped(Gone):
    """A store whose keeper is stopped."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "clone" else lambda *args: time.sleep(60)


@pytest.mark.parametrize("store", [Gone(), Stopped()], ids=["gone", "stopped"])
def test_a_store_that_does_not_answer_is_said_and_hangs_nobody(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "STORE_SECONDS", 0.2)
    ranks = Ranks(2, store=store)
    ranks.all[0].begin()
    started = time.monotonic()
    assert ranks.all[0].diagnose().startswith("rank 0, which keeps the ranks' store, does not answer")
    assert time.monotonic() - started < 2 and ranks.severed == [0]


class Paused:
    """A store whose keeper is stopped for a while."""

    def __init__(self, seconds: float) -> None:
        self._store, self._until = dist.HashStore(), time.monotonic() + seconds

    def __getattr__(self, name: str) -> Any:
        if name == "clone":
            raise AttributeError
        time.sleep(max(self._until - time.monotonic(), 0))
        return getattr(self._store, name)


def test_a_store_that_is_slow_is_waited_for_as_long_as_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "STORE_SECONDS", 0.1)
    for call in (lambda one: one.exchange_facts({"a": "1"}), lambda one: one.failed(ValueError("boom"))):
        ranks = Ranks(2, store=Paused(0.5))
        ranks.begin()
        ranks.at_once(*(partial(call, one) for one in ranks.all))
        assert not ranks.severed and not any(one.why_broken for one in ranks.all)
        for one in ranks.all:
            one.close()


def test_the_order_of_nan_travels(two: Ranks) -> None:
    first, second = two.all
    statuses = two.at_once(failing(first, NotFinite("here", (3, 7))), failing(second))
    assert statuses[1][0].order == (3, 7) and statuses[0][1].order is None
