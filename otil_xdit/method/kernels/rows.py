"""Rows next to a rank's: packed for a message together with moments, and put above and below its map.

`pack_rows` does what the copies of `otil_xdit.exchange.moments` do before a message, `pad_rows` what
`otil_xdit.exchange.halo` does to extrapolate rows, to keep them and to join them to the map. One launch each.

Maps stay in their memory format, channels last or first.

Shapes: B batch, C channels, h rows of this rank, W columns, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from otil_xdit.method.memory_format import is_channels_last

_BLOCK = 512
"""Numbers of a program."""

KEPT, GIVEN, MOVED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where rows come from: as they were kept; given now, and to be kept; kept, and moved on as between two steps."""


@triton.jit
def place_in_map(index, channels, height, width, LAST: tl.constexpr):
    """Return image, channel, row and column of the numbers of a map, by their order in memory, channels last or not."""
    if LAST:
        channel, line = index % channels, index // channels
        return line // (width * height), channel, (line // width) % height, line % width
    line = index // width
    return line // (height * channels), (line // height) % channels, line % height, index % width


@triton.jit
def _copy_rows(
    rows, out, count, channels, height, width, image_step, channel_step, row_step, column_step, BLOCK: tl.constexpr
):
    """Copy a part of rows, [B, C, height, W] of any strides, to `out`, contiguous."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image, channel, row, column = place_in_map(index, channels, height, width, False)
    at = image * image_step + channel * channel_step + row * row_step + column * column_step
    tl.store(out + index, tl.load(rows + at, mask=index < count), mask=index < count)


@triton.jit
def _pack_rows(
    mean, var, kept, sent, size, up, to_previous, up_count, up_height, down, to_next, down_count, down_height,
    channels, width, image_step, channel_step, row_step, column_step,
    SIZE: tl.constexpr, SENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments, rows for the rank before, or rows for the one after. kept, sent: float32 [2, B, G]."""
    part = tl.program_id(1)
    if part == 0:
        if tl.program_id(0) == 0:
            lane = tl.arange(0, SIZE)
            first = tl.load(mean + lane, mask=lane < size)
            second = tl.load(var + lane, mask=lane < size)
            tl.store(kept + lane, first, mask=lane < size)
            tl.store(kept + size + lane, second, mask=lane < size)
            if SENDS:
                tl.store(sent + lane, first, mask=lane < size)
                tl.store(sent + size + lane, second, mask=lane < size)
    elif part == 1:
        _copy_rows(
            up,
            to_previous,
            up_count,
            channels,
            up_height,
            width,
            image_step,
            channel_step,
            row_step,
            column_step,
            BLOCK,
        )
    else:
        _copy_rows(
            down,
            to_next,
            down_count,
            channels,
            down_height,
            width,
            image_step,
            channel_step,
            row_step,
            column_step,
            BLOCK,
        )


@triton.jit
def rows_of(
    last, before, given, at, given_at, there, gain, FROM: tl.constexpr, KEPT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Return rows next to the map, and keep what is given."""
    if FROM == GIVEN:
        found = tl.load(given + given_at, mask=there, other=0.0)
        tl.store(last + at, found, mask=there)
        return found
    found = tl.load(last + at, mask=there, other=0.0)
    if FROM == KEPT:
        return found
    change = found.to(tl.float32) - tl.load(before + at, mask=there, other=0.0).to(tl.float32)
    return (found.to(tl.float32) + gain * change).to(last.dtype.element_ty)


@triton.jit
def _pad_rows(
    x, out, above, above_before, above_given, below, below_before, below_given, count, channels, height, width,
    above_height, below_height, image_step, channel_step, row_step, column_step,
    above_image, above_channel, above_row, above_column, below_image, below_channel, below_row, below_column, gain,
    LAST: tl.constexpr, ABOVE: tl.constexpr, BELOW: tl.constexpr, KEPT: tl.constexpr, GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of the padded map, in the order of its memory."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    total = above_height + height + below_height
    image, channel, row, column = place_in_map(index, channels, total, width, LAST)
    is_above = inside & (row < above_height)
    is_below = inside & (row >= above_height + height)
    of_map = inside & (row >= above_height) & (row < above_height + height)
    at = image * image_step + channel * channel_step + (row - above_height) * row_step + column * column_step
    found = tl.load(x + at, mask=of_map, other=0.0)
    at = ((image * channels + channel) * above_height + row) * width + column
    given_at = image * above_image + channel * above_channel + row * above_row + column * above_column
    upper = rows_of(above, above_before, above_given, at, given_at, is_above, gain, ABOVE, KEPT, GIVEN)
    row -= above_height + height
    at = ((image * channels + channel) * below_height + row) * width + column
    given_at = image * below_image + channel * below_channel + row * below_row + column * below_column
    lower = rows_of(below, below_before, below_given, at, given_at, is_below, gain, BELOW, KEPT, GIVEN)
    tl.store(out + index, tl.where(is_above, upper, tl.where(is_below, lower, found)), mask=inside)


def launch_pack_rows(
    mean: torch.Tensor,
    var: torch.Tensor,
    kept: torch.Tensor,
    sent: torch.Tensor | None,
    up: torch.Tensor | None,
    to_previous: torch.Tensor | None,
    down: torch.Tensor | None,
    to_next: torch.Tensor | None,
) -> None:
    """Write moments and rows to where they are sent from.

    Args:
        mean, var: float32 [B, G].
        kept, sent: become both, float32 [2, B, G]; `sent` may be missing.
        up, down: the rows for the rank before and for the one after, [B, C, rows, W] of one map; None for no such rank.
        to_previous, to_next: become the rows, contiguous.
    """
    pairs = (up, to_previous), (down, to_next)
    counts = [0 if rows is None else rows.numel() for rows, _ in pairs]
    like = up if up is not None else down
    assert like is not None, "each rank has a neighbour"
    sides: list[Any] = []
    for (rows, out), count in zip(pairs, counts, strict=True):
        sides += [like, like, 0, 1] if rows is None else [rows, out, count, rows.shape[2]]
    size = mean.numel()
    _pack_rows[(max(1, triton.cdiv(max(counts), _BLOCK)), 3)](
        mean, var, kept, kept if sent is None else sent, size, *sides, like.shape[1], like.shape[3], *like.stride(),
        SIZE=triton.next_power_of_2(size), SENDS=sent is not None, BLOCK=_BLOCK,
    )  # fmt: skip


pack_rows = torch.library.custom_op(
    "otil_xdit::pack_rows", launch_pack_rows, mutates_args=("kept", "sent", "to_previous", "to_next")
)
"""`launch_pack_rows`, as an operator of torch."""


@pack_rows.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


def side_of(
    last: torch.Tensor, before: torch.Tensor, given: torch.Tensor | None, moves: bool
) -> tuple[list[torch.Tensor], Sequence[int], tl.constexpr]:
    """Return what kernels need of the rows on one side of a map: the rows, the strides of those given, and `rows_of`'s
    source; arguments as of `launch_pad_rows`."""
    rows = [last, before, last if given is None else given]
    if given is not None:
        return rows, given.stride(), GIVEN
    return rows, [0] * 4, MOVED if moves else KEPT


def launch_pad_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    above: torch.Tensor,
    above_before: torch.Tensor,
    above_given: torch.Tensor | None,
    below: torch.Tensor,
    below_before: torch.Tensor,
    below_given: torch.Tensor | None,
    gain: float,
    moves_above: bool,
    moves_below: bool,
) -> None:
    """Write a map between the rows above and below it.

    Args:
        x: [B, C, h, W].
        out: becomes the map with its rows, in its memory format.
        above, below: the rows that came last, [B, C, rows, W], contiguous; become those that are given.
        above_before, below_before: those of the step before, alike.
        above_given, below_given: the rows, of any strides, where they are known now.
        gain: how far rows are moved on.
        moves_above, moves_below: whether they are.
    """
    upper, upper_strides, upper_from = side_of(above, above_before, above_given, moves_above)
    lower, lower_strides, lower_from = side_of(below, below_before, below_given, moves_below)
    _pad_rows[(triton.cdiv(out.numel(), _BLOCK),)](
        x, out, *upper, *lower, out.numel(), *x.shape[1:], above.shape[2], below.shape[2], *x.stride(),
        *upper_strides, *lower_strides, gain,
        LAST=is_channels_last(out), ABOVE=upper_from, BELOW=lower_from, KEPT=KEPT, GIVEN=GIVEN, BLOCK=_BLOCK,
    )  # fmt: skip


pad_rows = torch.library.custom_op("otil_xdit::pad_rows", launch_pad_rows, mutates_args=("out", "above", "below"))
"""`launch_pad_rows`, as an operator of torch."""


@pad_rows.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
