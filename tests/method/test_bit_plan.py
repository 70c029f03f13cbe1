"""How bits are shared out: to where features vary, within the row, and in the order in which they gain most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otil_xdit.method.bit_plan import bits_of, places_of, plan_of, upgrade_falls
from otil_xdit.method.codec import OCTAVE
from otil_xdit.method.scratch import ScratchBuffers

ROOM = ScratchBuffers(torch.device("cpu"))


def limit(bits: int) -> torch.Tensor:
    return torch.tensor(bits)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 255), min_size=1, max_size=80),
    row=st.integers(1, 90),
)
def test_bits_fill_the_row_and_no_code_crosses_a_byte(sizes: list[int], row: int) -> None:
    row = min(row, len(sizes))
    bits = bits_of(torch.tensor(sizes, dtype=torch.uint8), limit(8 * row), ROOM)
    assert set(bits.tolist()) <= {0, 1, 2, 4, 8}
    assert 8 * row - 4 < bits.sum() <= 8 * row or (bits == 8).all()
    larger = torch.tensor(sizes)[:, None] > torch.tensor(sizes)[None]
    assert (bits[:, None] >= bits[None])[larger].all()
    byte, shift = places_of(bits)
    taken = [
        place
        for start, low, width in zip(byte.tolist(), shift.tolist(), bits.tolist(), strict=True)
        for place in range(8 * start + low, 8 * start + low + width)
    ]
    assert len(set(taken)) == len(taken) and max(taken, default=0) < 8 * row
    assert all(low + width <= 8 for low, width in zip(shift.tolist(), bits.tolist(), strict=True))


LEFT = {0: 1.0, 1: 0.3634, 2: 0.1175, 4: 0.0095, 8: 0.0001}
"""Of a normal feature's variance, by its bits (J. Max, 1960; see `otil_xdit.method.bit_plan`)."""


@pytest.mark.parametrize("seed", range(3))
def test_bits_are_where_they_leave_the_least_error(seed: int) -> None:
    """Within a tenth of what buying the upgrade with the largest gain leaves, time after time, in real numbers."""
    sizes = (128 + 12 * torch.randn(64, generator=torch.Generator().manual_seed(seed))).round()
    variances, next_of = (2 ** (2 * (sizes - 128) / OCTAVE)).tolist(), {0: 1, 1: 2, 2: 4, 4: 8}

    def gain(feature: int) -> float:
        bits = best[feature]
        return variances[feature] * (LEFT[bits] - LEFT[next_of[bits]]) / (next_of[bits] - bits) if bits < 8 else 0.0

    best = [0] * 64
    while sum(best) < 2 * 64:
        feature = max(range(64), key=gain)
        best[feature] = next_of[best[feature]]
    bits = bits_of(sizes.to(torch.uint8), limit(2 * 64), ROOM).tolist()
    found, least = (sum(size * LEFT[of] for size, of in zip(variances, one, strict=True)) for one in (bits, best))
    assert found <= 1.1 * least


def test_a_feature_of_equal_size_comes_first_by_its_place() -> None:
    bits = bits_of(torch.full((2, 8), 100, dtype=torch.uint8), limit(8), ROOM)
    assert bits.tolist() == [[1] * 8] * 2
    assert bits_of(torch.full((6,), 100, dtype=torch.uint8), limit(8), ROOM).tolist() == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("bits", "left"), [(1, 0.37), (2, 0.125)])
def test_levels_are_those_of_their_number_of_bits(bits: int, left: float) -> None:
    """Features of equal size that all have `bits`; J. Max, 1960, table II: 0.3634 and 0.1188 of the variance."""
    width = 64
    row = bits * width // 8
    spectrum = torch.full((1, width), 128, dtype=torch.uint8)
    plan = plan_of(spectrum, (row,), ROOM)
    numbers = torch.randn(4000, width, generator=torch.Generator().manual_seed(0))
    codes = (numbers * plan.density + plan.middle).floor().clamp(0).minimum(plan.highest)
    levels = (codes - plan.highest / 2) / plan.density
    assert (levels - numbers).square().mean() < left


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    spread=st.integers(1, 255),
    limit_of=st.integers(0, 500),
)
def test_upgrades_are_bought_in_their_order_until_one_is_beyond_the_budget(
    sizes: list[int], spread: int, limit_of: int
) -> None:
    sizes = [size * spread // 255 for size in sizes]
    costs = (1, 1, 2, 4)
    offers = [
        (-(size - fall), feature, cost)
        for feature, size in enumerate(sizes)
        for fall, cost in zip(upgrade_falls(), costs, strict=True)
    ]
    bits, spent = [0] * len(sizes), 0
    for _, feature, cost in sorted(offers):
        spent += cost
        if spent > limit_of:
            break
        bits[feature] += cost
    assert bits_of(torch.tensor(sizes, dtype=torch.uint8), limit(limit_of), ROOM).tolist() == bits
