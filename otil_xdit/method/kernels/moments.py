"""`correct_moments`: what `otil_xdit.exchange.moments` does of a step whose moments are late, in one launch for 42.

Shapes: R ranks, B batch, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ONE, SHARE, FITTED = 0, 1, 2
"""Weights of a rank's error."""


@triton.jit
def _raw(mean, var):
    """Return a mean square of mean and variance."""
    return var + mean * mean


@triton.jit
def _correct_moments(
    mean_now,
    var_now,
    share,
    received,
    before,
    assumed,
    sent,
    mean_out,
    var_out,
    own,
    gain,
    R: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    EXTRAPOLATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: all of it is a few hundred numbers. Pointers are float32; `ROWS` x `COLS` hold B x G."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < B) & (col < G)
    at = row * G + col
    size = B * G
    mean = tl.load(mean_now + at, mask=inside, other=0.0)
    var = tl.load(var_now + at, mask=inside, other=0.0)
    tl.store(sent + at, mean, mask=inside)
    tl.store(sent + size + at, var, mask=inside)
    mine = own * 2 * size + at
    own_mean = tl.load(received + mine, mask=inside, other=0.0)
    own_var = tl.load(received + mine + size, mask=inside, other=0.0)

    mean_weight = tl.load(share + own) if WEIGHT != 0 else 1.0
    var_weight = mean_weight
    if WEIGHT == 2:  # of this rank's error in means and mean squares of the step before
        whole_mean = tl.zeros((ROWS, COLS), tl.float32)
        whole_square = tl.zeros((ROWS, COLS), tl.float32)
        for rank in tl.static_range(R):
            place = rank * 2 * size + at
            weight = tl.load(share + rank)
            m = tl.load(received + place, mask=inside, other=0.0)
            v = tl.load(received + place + size, mask=inside, other=0.0)
            whole_mean += weight * (m - tl.load(assumed + place, mask=inside, other=0.0))
            whole_square += weight * (_raw(m, v) - tl.load(assumed + place + size, mask=inside, other=0.0))
        missed_mean = own_mean - tl.load(assumed + mine, mask=inside, other=0.0)
        missed_square = _raw(own_mean, own_var) - tl.load(assumed + mine + size, mask=inside, other=0.0)
        along = tl.sum(tl.sum(whole_mean * missed_mean, 1), 0)
        length = tl.maximum(tl.sum(tl.sum(missed_mean * missed_mean, 1), 0), 1e-30)
        fitted_mean = tl.maximum(tl.minimum(along / length, 1.0), mean_weight)
        along = tl.sum(tl.sum(whole_square * missed_square, 1), 0)
        length = tl.maximum(tl.sum(tl.sum(missed_square * missed_square, 1), 0), 1e-30)
        var_weight = tl.maximum(tl.minimum(along / length, 1.0), mean_weight)
        mean_weight = fitted_mean

    mean_gain = tl.zeros((ROWS, 1), tl.float32)
    var_gain = tl.zeros((ROWS, 1), tl.float32)
    if EXTRAPOLATED:  # as far as this rank's own have moved, image by image
        speed = own_mean - tl.load(before + mine, mask=inside, other=0.0)
        along = tl.sum((mean - own_mean) * speed, 1)[:, None]
        mean_gain = along / tl.maximum(tl.sum(speed * speed, 1)[:, None], 1e-30)
        mean_gain = tl.minimum(tl.maximum(mean_gain, 0.0), gain)
        speed = own_var - tl.load(before + mine + size, mask=inside, other=0.0)
        along = tl.sum((var - own_var) * speed, 1)[:, None]
        var_gain = along / tl.maximum(tl.sum(speed * speed, 1)[:, None], 1e-30)
        var_gain = tl.minimum(tl.maximum(var_gain, 0.0), gain)

    whole = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    missing_mean = mean
    missing_square = _raw(mean, var)
    for rank in tl.static_range(R):
        place = rank * 2 * size + at
        weight = tl.load(share + rank)
        m = tl.load(received + place, mask=inside, other=0.0)
        v = tl.load(received + place + size, mask=inside, other=0.0)
        if EXTRAPOLATED:
            m += mean_gain * (m - tl.load(before + place, mask=inside, other=0.0))
            v += var_gain * (v - tl.load(before + place + size, mask=inside, other=0.0))
            v = tl.maximum(v, 0.0)
        s = _raw(m, v)
        tl.store(assumed + place, m, mask=inside)
        tl.store(assumed + place + size, s, mask=inside)
        whole += weight * m
        square += weight * s
        is_own = tl.where(rank == own, 1.0, 0.0)
        missing_mean -= is_own * m
        missing_square -= is_own * s
    whole += mean_weight * missing_mean
    square += var_weight * missing_square
    variance = square - whole * whole
    tl.store(mean_out + at, whole, mask=inside)
    tl.store(var_out + at, tl.where(variance < 0, var, variance), mask=inside)


def launch_correct_moments(
    mean: torch.Tensor,
    var: torch.Tensor,
    share: torch.Tensor,
    received: torch.Tensor,
    before: torch.Tensor,
    assumed: torch.Tensor,
    sent: torch.Tensor,
    own: int,
    gain: float,
    extrapolated: bool,
    weight: int,
    whole_mean: torch.Tensor,
    whole_var: torch.Tensor,
) -> None:
    """Write the whole maps' moments, from those that came last and this rank's of now.

    Args:
        mean, var: this rank's, float32 [B, G].
        share: of the rows, float32 [R].
        received, before: means and variances that came last and a step before, float32 [R, 2, B, G].
        assumed: means and mean squares that the last late step assumed, [R, 2, B, G]; becomes what this one does.
        sent: becomes this rank's moments, [2, B, G].
        own: this rank.
        gain: the most that moments are extrapolated by.
        extrapolated: whether they are; otherwise they are taken as they came.
        weight: of this rank's error: `ONE`, its `SHARE` of the rows, or `FITTED` to the error of the last step.
        whole_mean, whole_var: become the moments, [B, G].
    """
    ranks, _, batch, groups = received.shape
    constants = {"ROWS": triton.next_power_of_2(batch), "COLS": triton.next_power_of_2(groups), "num_warps": 1}
    pointers = (mean, var, share, received, before, assumed, sent, whole_mean, whole_var)
    _correct_moments[(1,)](*pointers, own, gain, ranks, batch, groups, extrapolated, weight, **constants)


correct_moments = torch.library.custom_op(
    "otil_xdit::correct_moments", launch_correct_moments, mutates_args=("assumed", "sent", "whole_mean", "whole_var")
)
"""`launch_correct_moments`, as an operator of torch."""


@correct_moments.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
