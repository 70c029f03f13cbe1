"""What docs/supported-models.md says of every DiT is what its records say, and nothing in them is wrong in silence."""

from __future__ import annotations

import pytest

from tests.networks.test_dit_exactness import CONTROL, REFUSED, STOPPED, TOLERANCE, WITHOUT_PLUGIN
from tests.support.dits import CASES
from tests.workers import models_table as page

LINES = page.records()


def test_the_page_says_what_the_records_say() -> None:
    assert page.BEGIN + page.table(LINES) + page.END in page.PAGE.read_text(), "run tests/workers/models_table.py"


def test_every_line_is_exact_or_refused_by_name() -> None:
    for line in LINES:
        assert page.cell([line]) != "FAILS", line
        if line["stopped"] is None and page.NOTHING not in line["exchange"]:
            assert line["max_abs_error"] <= TOLERANCE, line


def test_with_nothing_exchanged_every_line_is_wrong() -> None:
    for line in LINES:
        if page.NOTHING in line["exchange"] and line["stopped"] is None:
            assert line["max_abs_error"] > CONTROL, line


@pytest.mark.parametrize("case", CASES)
def test_no_case_is_silent(case: str) -> None:
    found = [line for line in LINES if line["case"] == case and line["degrees"] == "patch 2"]
    exact, *others = (
        page.cell([one for one in found if one["exchange"] == way]) for way in page.exchanges_of(CASES[case])
    )
    if case in {*REFUSED, *STOPPED, *WITHOUT_PLUGIN}:
        assert exact == "refused"
    else:
        assert exact not in ("", "refused") and others[0], "an error, and its negative control"


def test_a_line_that_fails_would_be_seen() -> None:
    line = {"case": "flux", "degrees": "patch 2", "exchange": "plugin", "max_abs_error": None, "stopped": "KeyError: x"}
    assert (
        page.cell([line]) == "FAILS" and page.cell([{**line, "stopped": "--parallel does not support X"}]) == "refused"
    )
