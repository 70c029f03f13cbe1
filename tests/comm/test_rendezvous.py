"""Calls that only some ranks make, or make late: given up by all alike, and the next call is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.errors import PipelineBusyError

TIMEOUT = 0.3


class Ranks:
    """Detectors of some ranks round one store."""

    def __init__(self, count: int) -> None:
        store = dist.HashStore()
        self.severed: list[int] = []
        self.all = [
            FailureDetector("s", "g", range(count), rank, TIMEOUT, store, "rank 0", partial(self.severed.append, rank))
            for rank in range(count)
        ]
        self._pool = ThreadPoolExecutor(count)

    def call(self, rank: int, prompt: str) -> Future[str]:
        """Have a rank make a call; its facts are the prompt. What it ends with, in a word or the error's text."""
        return self._pool.submit(self._called, self.all[rank], prompt)

    def together(self, prompt: str) -> set[str]:
        """What a call that all ranks make ends with."""
        return {made.result(10) for made in [self.call(rank, prompt) for rank in range(len(self.all))]}

    def _called(self, detector: FailureDetector, prompt: str) -> str:
        detector.begin()
        try:
            by_rank = detector.exchange_facts({"prompt": prompt})
        except PipelineBusyError as error:
            return str(error)
        detector.done()
        return " ".join(sorted({facts["prompt"] for facts in by_rank.values()}))


@pytest.fixture
def ranks() -> Iterator[Callable[[int], Ranks]]:
    made: list[Ranks] = []

    def make(count: int) -> Ranks:
        made.append(Ranks(count))
        return made[-1]

    yield make
    for one in made:
        assert not one.severed, "the connections stay"
        for detector in one.all:
            detector.close()


def test_a_call_of_some_ranks_is_given_up_by_all_of_them_and_the_next_is_served(ranks: Any) -> None:
    three = ranks(3)
    assert three.together("a") == {"a"}
    began = time.monotonic()
    alone = [three.call(rank, "b") for rank in (0, 2)]
    for rank, made in zip((0, 2), alone, strict=True):
        said = made.result(10)
        assert said.startswith(f"rank {rank}: rank 1 did not come to this call within 0.3 s"), said
    assert time.monotonic() - began < 1.5
    assert three.together("c") == {"c"}


@pytest.mark.parametrize("again", ["the same call", "another call"])
def test_a_rank_that_was_not_meant_to_come_makes_the_next_call(ranks: Any, again: str) -> None:
    two = ranks(2)
    for _ in range(2):
        assert "did not come" in two.call(0, "the same call").result(10)
    assert two.together(again) == {again} and two.together("d") == {"d"}


@pytest.mark.parametrize("others_first", [True, False])
def test_a_rank_that_comes_late_is_refused_and_all_go_on_together(ranks: Any, others_first: bool) -> None:
    two = ranks(2)
    assert "rank 1 did not come" in two.call(0, "a").result(10)
    if others_first:
        onwards = two.call(0, "b")
        time.sleep(0.1)
    late = two.call(1, "a")
    if not others_first:
        time.sleep(0.1)
        onwards = two.call(0, "b")
    assert late.result(10).startswith("rank 1: rank 1 did not come to this call within 0.3 s") and not onwards.done()
    assert two.call(1, "b").result(10) == onwards.result(10) == "b"


def test_ranks_that_call_one_after_the_other_do_not_get_out_of_step(ranks: Any) -> None:
    two = ranks(2)
    assert "rank 1 did not come" in two.call(0, "a").result(10)
    assert "come since" in two.call(1, "a").result(10), "rank 0 makes no call any more"
    assert two.together("b") == {"b"}


def test_whoever_comes_at_the_last_moment_sees_what_the_others_see(ranks: Any) -> None:
    two = ranks(2)
    for delay in (0.27, 0.3, 0.33):
        first = two.call(0, f"{delay}")
        time.sleep(delay)
        second = two.call(1, f"{delay}")
        assert (first.result(10) == f"{delay}") == (second.result(10) == f"{delay}")
        assert two.together("next") == {"next"}


def test_facts_that_come_while_the_others_give_up_begin_nothing(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ranks(2).all
    first.begin()
    second.begin()
    board, facts = second._board, second._board.facts
    first._board.post_facts({})

    def seen() -> Any:
        found = facts()
        first._board.settle("rank 1 did not come")
        return found

    monkeypatch.setattr(board, "facts", seen)
    with pytest.raises(PipelineBusyError, match="rank 1: rank 1 did not come; nothing was begun"):
        second.exchange_facts({})


def test_nothing_of_earlier_calls_stays_in_the_store() -> None:
    store = dist.HashStore()
    two = [FailureDetector("s", "g", range(2), rank, TIMEOUT, store, "rank 0", lambda: None) for rank in range(2)]
    pool = ThreadPoolExecutor(2)

    def call(detector: FailureDetector) -> None:
        detector.begin()
        detector.exchange_facts({})
        detector.done()

    kept = []
    for _ in range(3):
        two[0].begin()
        with pytest.raises(PipelineBusyError):
            two[0].exchange_facts({})
        [made.result(10) for made in [pool.submit(call, one) for one in two]]
        two[0]._board.poll(), two[1]._board.poll()
        kept.append(store.num_keys())
    assert kept[1] == kept[2]
    for one in two:
        one.close()
