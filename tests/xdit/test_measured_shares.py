"""`--patch_shares auto`: how measured seconds become shares, and what ranks make of them."""

from __future__ import annotations

import pytest

from otil_xdit.xdit.plugin.measured_shares import shares_of
from tests.support.torchrun import lines_of


@pytest.mark.parametrize(
    ("seconds", "shares"),
    [
        ([1.0, 1.0], ()),
        ([1.0, 1.09], ()),
        ([1.0, 2.0], (20, 10)),
        ([0.3, 0.2], (10, 15)),
        ([0.1, 0.1, 0.4], (40, 40, 10)),
    ],
)
def test_a_patch_gets_rows_by_its_speed(seconds: list[float], shares: tuple[int, ...]) -> None:
    assert shares_of(seconds) == shares


@pytest.mark.slow
def test_measured_shares_change_the_rows_and_not_the_image() -> None:
    faster, equal = lines_of(2, "measured_shares.py")
    for line in (faster, equal):
        for rank in line["ranks"]:
            assert rank["error"] < 1e-5 and rank["seconds"] > 0
    rows = [[rank["rows"] for rank in line["ranks"]] for line in (faster, equal)]
    assert rows == [[32, 16], [24, 24]]
