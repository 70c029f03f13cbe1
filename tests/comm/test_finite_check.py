"""NaN and Inf among a rank's own numbers."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.comm.finite_check import FiniteCheck
from otil_xdit.errors import NotFinite


def seen(*values: float) -> FiniteCheck:
    check = FiniteCheck()
    for place, value in enumerate(values):
        check.record(f"block.{place}", torch.tensor([1.0, value], dtype=torch.float16), torch.ones(2))
    return check


def test_the_first_layer_is_named() -> None:
    with pytest.raises(NotFinite, match="rank 3: .* layer block.1 at step 5") as caught:
        seen(1.0, float("nan"), float("inf")).check(5, 3, False)
    assert caught.value.order == (5, 2), "two sums a layer"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_each_of_them_is_found(value: float) -> None:
    with pytest.raises(NotFinite):
        seen(value).check(0, 0, False)


def test_large_numbers_are_finite() -> None:
    check = seen(65504.0, -65504.0)
    check.record("sum", torch.full((100,), 65504.0, dtype=torch.float16))
    check.check(0, 0, False)


def test_a_step_is_looked_at_once_and_a_generation_forgets() -> None:
    check = seen(float("nan"))
    check.begin()
    check.check(0, 0, True)
    check.record("block.0", torch.ones(1))
    check.check(1, 0, True)
