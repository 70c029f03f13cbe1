"""Calls drawn at random out of diffusers' own signatures: what one process gives under `sync`, or a refusal.

`tests/workers/drawn_calls.py` says what is drawn.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchrun import lines_of

AT_ONCE = 50
"""Draws of one torchrun."""


def drawn(first: int, count: int) -> dict[str, Any]:
    """How so many draws ended; fails where one ended wrong."""
    *wrong, counts = lines_of(2, "drawn_calls.py", "--first", str(first), "--count", str(count), may_fail=True)
    assert not wrong and counts["draws"] == count, wrong
    return counts


def test_thirty_calls_are_exact_or_refused() -> None:
    counts = drawn(0, 30)
    assert counts["equal"] >= 10 and counts["refused"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("first", range(30, 530, AT_ONCE))
def test_five_hundred_more_are(first: int) -> None:
    drawn(first, AT_ONCE)
