"""A denoising loop of one's own, bracketed by `otil_xdit.generation`, on two real ranks."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

import otil_xdit
from tests.support.torchrun import lines_of


@cache
def found() -> dict[str, Any]:
    (line,) = lines_of(2, "own_loop.py")
    return line


def test_sync_gives_what_one_process_gives() -> None:
    assert found()["sync"]["from_one_process"] <= 1e-4
    assert found()["otil"]["from_one_process"] > 1e-2, "otil is an approximation: the loop has reached the exchange"


@pytest.mark.parametrize("strategy", ["sync", "otil"])
def test_it_gives_what_the_pipeline_gives_for_the_same_bytes(strategy: str) -> None:
    line = found()[strategy]
    assert line["from_the_pipeline"] == 0.0 and line["same_bytes"] and line["steps"] == 6


@pytest.mark.parametrize("strategy", ["sync", "otil"])
def test_a_loop_without_the_pipeline_s_scheduler_ticks_by_itself(strategy: str) -> None:
    assert found()[strategy]["ticked"] == 0.0 and found()[strategy]["ticked_steps"] == 6


def test_a_pipeline_that_exchanges_nothing_may_use_it() -> None:
    with otil_xdit.generation(SimpleNamespace(), steps=2) as generation:
        generation.tick()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps is .*; give a whole number from 1 up"):
        with otil_xdit.generation(SimpleNamespace(), steps=steps):
            pass
