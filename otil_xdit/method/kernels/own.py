"""A rank's own keys and values, read once: for attention, for the payload and for what they tell of their change.

`take_own` does what copies of keys and values, `Coordinates.into` and `Predictor.residual_of` do, and leaves sums for
`otil_xdit.method.kernels.choices` and `otil_xdit.method.kernels.adaptive`. It sums the numbers, too, so that NaN among
them is found. The copies that all this is compared with may have to follow a payload first, as in
`otil_xdit.method.kernels.adaptive_copies`.

Shapes: N patches, B batch, H heads, S tokens of this rank, d features of a head, C = H * d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.adaptive_copies import follow_payload
from otil_xdit.method.kernels.bits import BITS_AT, SIZE_AT
from otil_xdit.method.kernels.others import LARGEST_GAIN
from otil_xdit.method.kernels.tiles import Tiles
from otil_xdit.method.kernels.velocities import load_velocity, stored


@triton.jit
def _take_own(
    key, value, matrices, copies, velocities, expected, gains, trend, whole, taken, sums, totals, sizes, numbers,
    payload, words, slots, share, scales,
    key_image, key_head, key_token, value_image, value_head, value_token, whole_image, batch, tokens, heads,
    sent, scales_at, codes_at, key_row, value_row, constant, damping,
    D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    TURNS: tl.constexpr, COMPARES: tl.constexpr, DIFFERS: tl.constexpr, MOVES: tl.constexpr, SIZES: tl.constexpr,
    TRENDS: tl.constexpr, LARGEST: tl.constexpr, ATTENDS: tl.constexpr, FOLLOWS: tl.constexpr, C: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr, FITTED: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """Some tokens of some heads of one image's keys, or values.

    key, value: [B, H, S, d]; matrices: float32 [2, H, d, d]; copies, velocities, taken: [2, B, S, C]; expected, gains:
    float32 [2]; trend: float32 [3]; whole: this rank's part of [2, B, N, S, C]; sums, totals, numbers: one layer's
    of `ChangeSums`; sizes: float32 [tiles, 2 * B, C]; others of `follow_payload`.
    """
    tile, part, kv_image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv, image = kv_image // batch, (kv_image % batch).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    if kv == 0:
        source = key + image * key_image + row[:, None].to(tl.int64) * key_token
        head_stride = key_head
    else:
        source = value + image * value_image + row[:, None].to(tl.int64) * value_token
        head_stride = value_head
    if FOLLOWS:
        follow_payload(
            copies, velocities, payload, words, slots, share, scales,
            kv, kv_image, row, part * WIDTH, min(part * WIDTH + WIDTH, C), batch, tokens,
            sent, scales_at, codes_at, key_row, value_row, constant, damping,
            C, FEATURES, ROWS, BITS_AT, SIZE_AT, MOVES, FITTED, SELECTED,
        )  # fmt: skip
        tl.debug_barrier()  # the program's other threads read what it has written
    gain = 0.0
    if MOVES:
        gain = tl.load(expected + kv)
        if TRENDS:
            gain += tl.load(trend + kv) / (1.0 + tl.load(trend + 2))
            gain = tl.minimum(tl.maximum(gain, 0.0), LARGEST)
        if FITTED:  # as it travels
            gain = gain.to(tl.float16).to(tl.float32)
        if tile == 0 and part == 0 and image == 0:
            tl.store(gains + kv, gain)
    own = (kv_image.to(tl.int64) * tokens + row[:, None]) * (heads * D)
    attended = whole + kv_image.to(tl.int64) * whole_image + row[:, None].to(tl.int64) * (heads * D)
    square = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    speed = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for unit in range(part * UNITS, min(part * UNITS + UNITS, heads * SPLIT)):
        head, first = unit // SPLIT, (unit % SPLIT) * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (column < D)[None, :]
        given = tl.load(source + head * head_stride + column[None, :], mask=there, other=0.0)
        if ATTENDS:
            tl.store(attended + head * D + column[None, :], given.to(whole.dtype.element_ty), mask=there)
        found = given.to(tl.float32)
        total += tl.sum(found, 1)
        if TURNS:
            found = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, D, CHUNK):
                feature = start + tl.arange(0, CHUNK)
                known = inside[:, None] & (feature < D)[None, :]
                factor = tl.load(source + head * head_stride + feature[None, :], mask=known, other=0.0)
                known = (feature < D)[:, None] & (column < D)[None, :]
                at = ((kv * heads + head) * D + feature[:, None]) * D + column[None, :]
                matrix = tl.load(matrices + at, mask=known, other=0.0)
                found = tl.dot(factor.to(tl.float32), matrix, found, input_precision="tf32x3")
        place = own + head * D + column[None, :]
        change = found
        if COMPARES or DIFFERS:
            change = found - tl.load(copies + place, mask=there, other=0.0).to(tl.float32)
            if MOVES:
                velocity = load_velocity(velocities, place, there)
                change -= velocity * gain
            change = tl.where(there, change, 0.0)
        tl.store(taken + place, (change if DIFFERS else found).to(taken.dtype.element_ty), mask=there)
        if COMPARES:
            square += tl.sum(change * change, 1)
            if MOVES:
                along += tl.sum(change * velocity, 1)
                speed += tl.sum(velocity * velocity, 1)
        if SIZES:
            at = sizes + (tile * tl.num_programs(2) + kv_image).to(tl.int64) * (heads * D) + head * D + column
            tl.store(at, tl.sum(change * change, 0), mask=column < D)
    parts, images, tiles = tl.num_programs(1), tl.num_programs(2), tl.num_programs(0)
    program = (kv_image * parts + part) * tiles + tile
    tl.store(numbers + program, tl.sum(total, 0))
    if COMPARES:
        of_token = (part * images + kv_image) * tokens + row
        tl.store(sums + of_token, square, mask=inside)
        if MOVES:
            tl.store(totals + program * 2, tl.sum(along, 0))
            tl.store(totals + program * 2 + 1, tl.sum(speed, 0))


def launch_take_own(
    key: torch.Tensor,
    value: torch.Tensor,
    matrices: torch.Tensor | None,
    whole: torch.Tensor | None,
    taken: torch.Tensor,
    numbers: torch.Tensor,
    differs: bool,
    copies: torch.Tensor | None = None,
    velocities: torch.Tensor | None = None,
    expected: torch.Tensor | None = None,
    gains: torch.Tensor | None = None,
    trend: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    received: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    coded_at: int = 0,
    sent: int = 0,
    fitted: bool = False,
    constant: float = 0.0,
    damping: float = 0.0,
    rows: list[int] | None = None,
) -> None:
    """Read this rank's keys and values of a layer.

    Args:
        key, value: [B, H, S, d], a head's features next to each other.
        matrices: of `Coordinates.into`, float32 [2, H, d, d]; None to take the features as they are.
        whole: becomes keys and values, a part of [2, B, N, S, C], [2, B, S, C]; None to leave it.
        taken: becomes what is coded of them, [2, B, S, C], contiguous.
        numbers: becomes one layer's of `ChangeSums`.
        differs: whether `taken` becomes what the others' prediction of them lacks, instead.
        copies, velocities: what the others know, [2, B, S, C], contiguous; None where there is nothing to compare with,
            or nothing is extrapolated.
        expected: what is expected of the gains of that prediction, float32 [2]; read with velocities.
        gains: become these, [2]; written with velocities.
        trend: of `otil_xdit.method.gain_trend`, float32 [3], which they follow; None to take what was expected.
        sums, totals: become one layer's of `ChangeSums`; None where they are not wanted.
        sizes: becomes sums of squares of what the prediction lacks of each feature, over a tile's tokens, float32
            [tiles, 2 * B, C]; None where they are not wanted.
        received: this rank's payload, which the copies follow first, uint8 [size]; None where they have.
        words, slots, share: this rank's of `otil_xdit.method.kernels.adaptive_copies.launch_read_adaptive`.
        fitted: whether gains are fitted, and so travel.
        scales, coded_at, sent, constant, damping, rows: as for `launch_advance_adaptive` there.
    """
    batch, heads, tokens, size = key.shape
    key, value = (one if one.stride(3) == 1 else one.contiguous() for one in (key, value))
    tiles = Tiles.of(batch, tokens)
    constants, strides = tiles.constants(heads, size), (*key.stride()[:3], *value.stride()[:3])
    width, nothing = heads * size, numbers
    told = [nothing if part is None else part for part in (expected, gains, trend)]
    found = [nothing if part is None else part for part in (sums, totals, sizes)]
    coded = [nothing if part is None else part for part in (received, words, slots, share, scales)]
    _take_own[tiles.grid](
        key, value, taken if matrices is None else matrices, taken if copies is None else copies,
        taken if velocities is None else stored(velocities), *told, taken if whole is None else whole, taken,
        *found, numbers, *coded, *strides, 0 if whole is None else whole.stride(1), batch, tokens, heads,
        sent, coded_at, coded_at + 2 * batch * sent + 2 * width, *(rows or (0, 0)), constant, damping,
        **constants, TURNS=matrices is not None, COMPARES=sums is not None, DIFFERS=differs,
        MOVES=velocities is not None, SIZES=sizes is not None, TRENDS=trend is not None, LARGEST=LARGEST_GAIN,
        ATTENDS=whole is not None, FOLLOWS=received is not None,
        C=width, FEATURES=64, WIDTH=constants["UNITS"] // constants["SPLIT"] * size, BITS_AT=BITS_AT, SIZE_AT=SIZE_AT,
        FITTED=fitted, SELECTED=slots is not None and slots.numel() > 0, num_stages=1,
        enable_fp_fusion=False,  # copies are to have the same bits on all ranks
    )  # fmt: skip


take_own = torch.library.custom_op(
    "otil_xdit::take_own",
    launch_take_own,
    mutates_args=("whole", "taken", "numbers", "copies", "velocities", "gains", "sums", "totals", "sizes"),
)
"""`launch_take_own`, as an operator of torch."""


@take_own.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
