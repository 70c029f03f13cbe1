"""Rows next to a rank's, put above and below a map that lies between them already.

`join_rows` does what `otil_xdit.method.kernels.rows.pad_rows` does, without the map, in one launch.

Shapes: B batch, C channels, W columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.rows import GIVEN, KEPT, place_in_map, rows_of, side_of

_BLOCK = 256
"""Numbers of a program: with more of them sm_90's registers do not do."""


@triton.jit
def _side_rows(
    out, last, before, given, count, channels, height, width,
    out_image, out_channel, out_row, out_column, given_image, given_channel, given_row, given_column, gain,
    FROM: tl.constexpr, KEPT: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of the rows on one side of a map, `out`, [B, C, height, W]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    image, channel, row, column = place_in_map(index, channels, height, width, False)
    given_at = image * given_image + channel * given_channel + row * given_row + column * given_column
    found = rows_of(last, before, given, index, given_at, inside, gain, FROM, KEPT, GIVEN)
    at = image * out_image + channel * out_channel + row * out_row + column * out_column
    tl.store(out + at, found, mask=inside)


@triton.jit
def _join_rows(
    top, above, above_before, above_given, above_count, above_height,
    bottom, below, below_before, below_given, below_count, below_height,
    channels, width, image_step, channel_step, row_step, column_step,
    above_image, above_channel, above_row, above_column, below_image, below_channel, below_row, below_column, gain,
    ABOVE: tl.constexpr, BELOW: tl.constexpr, KEPT: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows above a map, or those below it."""
    if tl.program_id(1) == 0:
        _side_rows(
            top, above, above_before, above_given, above_count, channels, above_height, width,
            image_step, channel_step, row_step, column_step, above_image, above_channel, above_row, above_column, gain,
            ABOVE, KEPT, GIVEN, BLOCK,
        )  # fmt: skip
    else:
        _side_rows(
            bottom, below, below_before, below_given, below_count, channels, below_height, width,
            image_step, channel_step, row_step, column_step, below_image, below_channel, below_row, below_column, gain,
            BELOW, KEPT, GIVEN, BLOCK,
        )  # fmt: skip


def launch_join_rows(
    top: torch.Tensor,
    bottom: torch.Tensor,
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
    """Do what `launch_pad_rows` does to a map that lies between its rows already.

    Args:
        top, bottom: become the rows above the map and below it, [B, C, rows, W], parts of one padded map.
        above, above_before, above_given, below, below_before, below_given, gain, moves_above, moves_below: as for
            `launch_pad_rows`.
    """
    upper, upper_strides, upper_from = side_of(above, above_before, above_given, moves_above)
    lower, lower_strides, lower_from = side_of(below, below_before, below_given, moves_below)
    most = max(top.numel(), bottom.numel())
    _join_rows[(max(1, triton.cdiv(most, _BLOCK)), 2)](
        top, *upper, top.numel(), top.shape[2], bottom, *lower, bottom.numel(), bottom.shape[2],
        top.shape[1], top.shape[3], *top.stride(), *upper_strides, *lower_strides, gain,
        ABOVE=upper_from, BELOW=lower_from, KEPT=KEPT, GIVEN=GIVEN, BLOCK=_BLOCK,
    )  # fmt: skip


join_rows = torch.library.custom_op(
    "otil_xdit::join_rows", launch_join_rows, mutates_args=("top", "bottom", "above", "below")
)
"""`launch_join_rows`, as an operator of torch."""


@join_rows.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
