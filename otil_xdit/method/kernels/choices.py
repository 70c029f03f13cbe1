"""What a rank decides before it sends: its gains, and which sub-blocks changed most.

`settle` does what the second half of `Predictor.fitted_gain`, `otil_xdit.method.gain_trend.add`, `l2_of_difference`
and `TopKSelector.select` do, from the sums that `otil_xdit.method.kernels.own` leaves.

Shapes: l layers of a run; B batch, S tokens of this rank, K sub-blocks of T tokens, k sent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.gain_trend import FADING, SHARE
from otil_xdit.method.kernels.others import LARGEST_GAIN, fitted_gain

_PARTS = 512
"""Sums that are added at once to find a gain."""

_TOKENS = 1024
"""Tokens whose changes are added at once."""


@triton.jit
def _largest(bits, valid, count, BINS: tl.constexpr):
    """Tell which of some numbers, whole and not negative, are the `count` largest; of equal ones the first.

    In four rounds of eight bits: how many numbers have each value of the next bits, and where the last chosen one is.
    """
    bins = tl.arange(0, BINS)
    prefix = 0
    needed = count
    for round in tl.static_range(4):
        fits = valid
        if round > 0:
            fits = valid & ((bits >> (32 - 8 * round)) == prefix)
        # What does not fit is counted where no digit is.
        counts = tl.histogram(tl.where(fits, (bits >> (24 - 8 * round)) & 255, BINS - 1), BINS)
        counts = tl.where(bins < 256, counts, 0)
        above = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((above >= needed).to(tl.int32), 0) - 1
        needed -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = prefix * 256 + digit
    same = valid & (bits == prefix)
    first = tl.cumsum(same.to(tl.int32), 0) <= needed
    return (valid & (bits > prefix)) | (same & first)


@triton.jit
def _settle(
    sums, totals, gains, fitted, expected, trend, table, scores, selected, parts, tokens, images, count, blocks, sent,
    T: tl.constexpr, SIDE: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, LARGEST: tl.constexpr,
    PARTS: tl.constexpr, BINS: tl.constexpr, SHARE: tl.constexpr, FADING: tl.constexpr,
    FITTED: tl.constexpr, TRENDS: tl.constexpr,
    SCORES: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """One layer.

    sums, totals: of `ChangeSums`; gains, fitted, expected: float32 [l, 2]; trend: float32 [3]; scores: float32 [l, K];
    selected: int64 [l, k].
    """
    layer = tl.program_id(0).to(tl.int64)
    told_keys, told_values = tl.load(gains + layer * 2), tl.load(gains + layer * 2 + 1)
    keys, values = told_keys, told_values
    if FITTED:
        keys = fitted_gain(totals + layer * 4 * count, gains + layer * 2, 0, count, LARGEST, PARTS)
        values = fitted_gain(totals + layer * 4 * count, gains + layer * 2, 1, count, LARGEST, PARTS)
    if TRENDS:  # of one layer: nobody else adds to it
        tl.store(trend, tl.load(trend) * FADING + keys - tl.load(expected + layer * 2))
        tl.store(trend + 1, tl.load(trend + 1) * FADING + values - tl.load(expected + layer * 2 + 1))
        tl.store(trend + 2, tl.load(trend + 2) * FADING + 1.0)
    tl.store(fitted + layer * 2, keys)
    tl.store(fitted + layer * 2 + 1, values)
    tl.store(expected + layer * 2, told_keys + (keys - told_keys) * SHARE)
    tl.store(expected + layer * 2 + 1, told_values + (values - told_values) * SHARE)
    if SCORES:
        size = parts * images * tokens
        for start in range(0, blocks, STEP):
            block = start + tl.arange(0, STEP)[:, None]
            lane = tl.arange(0, SIDE)[None, :]
            there = (block < blocks) & (lane < T)
            token = tl.load(table + block * T + lane, mask=there, other=0)
            change = tl.zeros((STEP, SIDE), tl.float32)
            for place in range(0, parts * images):
                change += tl.load(sums + layer * size + place * tokens + token, mask=there, other=0.0)
            one = start + tl.arange(0, STEP)
            tl.store(scores + layer * blocks + one, tl.sum(change, 1), mask=one < blocks)
    if PICKS:
        tl.debug_barrier()
        block = tl.arange(0, BLOCKS)
        valid = block < blocks
        score = tl.load(scores + layer * blocks + block, mask=valid, other=0.0)
        chosen = _largest(score.to(tl.int32, bitcast=True), valid, sent, BINS)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(selected + layer * sent + place, block.to(tl.int64), mask=chosen)


def launch_settle(
    sums: torch.Tensor,
    totals: torch.Tensor,
    gains: torch.Tensor,
    fitted: torch.Tensor,
    expected: torch.Tensor,
    scores: torch.Tensor,
    table: torch.Tensor | None,
    trend: torch.Tensor | None,
    fits: bool,
    count: int,
) -> torch.Tensor:
    """Find the gains that fit a run of layers best, and the sub-blocks that are sent of them.

    Args:
        sums, totals: the layers' of `ChangeSums`.
        gains: that these were found with, of keys and values, float32 [l, 2].
        fitted: become those that fit, [l, 2].
        expected: what was expected of them, [l, 2]; become what is expected of the next step's.
        scores: become each sub-block's squared distance from what the others predict, float32 [l, K]; without numbers
            where nothing is compared.
        table: the tokens of each sub-block, int64 [K, T]; None where nothing is compared.
        trend: of `otil_xdit.method.gain_trend`, float32 [3], which what one layer has found is added to; None where it
            is not.
        fits: whether gains are fitted; otherwise they stay.
        count: how many of the most changed are selected, k of `MOST_BLOCKS` at most, in the order of their numbers; 0
            for none.

    Returns:
        The selected sub-blocks, int64 [l, k].
    """
    layers, parts, images, tokens = sums.shape
    blocks, side = (1, 1) if table is None else table.shape
    selected = torch.empty(layers, count, dtype=torch.int64, device=sums.device)
    lanes = triton.next_power_of_2(side)
    step = min(triton.next_power_of_2(blocks), max(1, _TOKENS // lanes))
    _settle[(layers,)](
        sums, totals, gains, fitted, expected, sums if trend is None else trend, selected if table is None else table,
        scores, selected, parts, tokens, images, totals.shape[2], blocks, count,
        T=side, SIDE=lanes, BLOCKS=triton.next_power_of_2(blocks), STEP=step, LARGEST=LARGEST_GAIN, PARTS=_PARTS,
        BINS=512, SHARE=SHARE, FADING=FADING, FITTED=fits, TRENDS=trend is not None, SCORES=scores.numel() > 0,
        PICKS=count > 0,
        num_warps=8,
    )  # fmt: skip
    return selected


settle = torch.library.custom_op(
    "otil_xdit::settle", launch_settle, mutates_args=("fitted", "expected", "scores", "trend")
)
"""`launch_settle`, as an operator of torch."""


@settle.register_fake
def _(
    sums: torch.Tensor,
    totals: torch.Tensor,
    gains: torch.Tensor,
    fitted: torch.Tensor,
    expected: torch.Tensor,
    scores: torch.Tensor,
    table: torch.Tensor | None,
    trend: torch.Tensor | None,
    fits: bool,
    count: int,
) -> torch.Tensor:
    return sums.new_empty(len(sums), count, dtype=torch.int64)
