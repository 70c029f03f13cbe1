"""The copies of keys and values of all patches, corrected by payloads in the adaptive codec.

`read_adaptive` finds how payloads are coded. `advance_adaptive` does what `AdaptiveCodec.decode_at` and
`Predictor.apply_residuals` do, for the copies of all ranks or of some, and what `Coordinates.back` does where attention
waits for the result, extrapolated if that is wanted. Copies are read and written once. A rank's own copies may follow
in `otil_xdit.method.kernels.own` instead, which reads them anyway.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent, m =
k * T tokens, V = 2 * B * m vectors of a layer's payload, R bytes of a row of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.bits import BITS_AT, SIZE_AT, read_plans, step_of
from otil_xdit.method.kernels.copies import advance_copies
from otil_xdit.method.kernels.others import LARGEST_GAIN, fitted_gain, write_turned
from otil_xdit.method.kernels.payloads import read_gains
from otil_xdit.method.kernels.tiles import Tiles
from otil_xdit.method.kernels.velocities import stored

ALL, OWN, OTHERS = 0, 1, 2
"""Whose copies are corrected."""

_PARTS = 512
"""Sums that are added at once to find a gain."""

_TOKENS = 4
"""Tokens that a program corrects: what it knows of features is read for all of them at once."""


@triton.jit
def follow_payload(
    value, velocity, payload, words, slots, share, scales,
    kv, kv_image, token, first, last, batch, tokens, sent, scales_at, codes_at, key_row, value_row,
    constant, damping,
    C: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr,
    MOVES: tl.constexpr, FITTED: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Have some tokens of one rank's copies of a layer follow its payload, in the features from `first` to `last`.

    value, velocity: [2, B, S, C]; payload: uint8 [size]; words: int32 [2, C]; slots, share: [S].
    """
    there = token < tokens
    gain, gain_of_others = constant, constant
    if FITTED:
        gain, gain_of_others = read_gains(payload, kv)
    moved = tl.full((TOKENS,), 0.0, tl.float32) + gain
    slot = token
    given = tl.full((TOKENS,), 1.0, tl.float32)
    kept = tl.full((TOKENS,), 1.0, tl.float32)
    is_sent = there
    if SELECTED:
        slot = tl.load(slots + token, mask=there, other=-1)
        given = tl.load(share + token, mask=there, other=0.0)
        is_sent = slot >= 0
        kept = tl.where(is_sent, 1.0, damping)
        moved = tl.where(is_sent, gain, gain_of_others)
    vector = kv_image * sent + tl.where(is_sent, slot, 0)
    byte = tl.load(payload + scales_at + vector, mask=is_sent, other=0).to(tl.int32)
    scale = tl.where(is_sent, tl.load(scales + byte), 0.0)
    length = tl.where(kv == 0, key_row, value_row)
    rows = payload + codes_at + tl.where(kv == 0, 0, batch * sent * key_row)
    rows += (vector - kv * batch * sent) * length
    row = (kv_image.to(tl.int64) * tokens + token) * C
    for start in range(first, last, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        word = tl.load(words + kv * C + feature, mask=feature < last, other=0)
        bits = (word >> BITS_AT) & 15
        place = word & 0xFFFF
        highest = (1 << bits) - 1
        step = step_of(bits) * tl.load(scales + (word >> SIZE_AT))
        inside = there[:, None] & (feature < last)[None, :]
        has_code = is_sent[:, None] & (bits > 0)[None, :]
        packed = tl.load(rows[:, None] + (place >> 3)[None, :], mask=has_code, other=0).to(tl.int32)
        code = (packed >> (place & 7)[None, :]) & highest[None, :]
        level = code.to(tl.float32) * step[None, :] - (step * highest.to(tl.float32) * 0.5)[None, :]
        at = row[:, None] + feature[None, :]
        advance_copies(
            value, velocity, at, inside, level, scale[:, None], moved[:, None], kept[:, None], given[:, None], MOVES
        )


@triton.jit
def _advance_adaptive(
    value, velocity, received, slots, share, words, scales, totals, gains,
    matrices, out, ranks, layers, batch, tokens, size, rank_size, sent, scales_at, codes_at, key_row, value_row,
    constant, damping, heads, own, count,
    C: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr, MOVES: tl.constexpr, FITTED: tl.constexpr, SELECTED: tl.constexpr,
    WHOSE: tl.constexpr, WRITES: tl.constexpr, PREDICTS: tl.constexpr, TURNS: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    LARGEST: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a part of the features, `WIDTH` wide, of one layer, rank, key or value, and image.

    received: uint8 [N, l, size], each rank's `rank_size` bytes after the last one's; slots, share: [l, N, S]; matrices,
    out: of `otil_xdit.method.kernels.others`, where the corrected copies of other ranks go at once; totals, gains: of
    `fitted_gain`, by which these are extrapolated first if `PREDICTS`; gains alone if nothing is fitted.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    kv_image, corrected = tl.program_id(1), tl.num_programs(2) // layers
    layer, rank = tl.program_id(2) // corrected, tl.program_id(2) % corrected
    if WHOSE == 1:
        rank = own
    elif WHOSE == 2:
        rank += (rank >= own).to(tl.int32)
    layer_rank = (layer * ranks + rank).to(tl.int64)
    kv = kv_image // batch
    token = tile * TOKENS + tl.arange(0, TOKENS)
    payload = received + rank.to(tl.int64) * rank_size + layer.to(tl.int64) * size
    copies = layer_rank * tl.num_programs(1) * tokens * C
    follow_payload(
        value + copies, velocity + copies, payload, words + layer_rank * 2 * C, slots + layer_rank * tokens,
        share + layer_rank * tokens, scales, kv, kv_image, token, part * WIDTH, min(part * WIDTH + WIDTH, C),
        batch, tokens, sent, scales_at, codes_at, key_row, value_row, constant, damping,
        C, FEATURES, TOKENS, BITS_AT, SIZE_AT, MOVES, FITTED, SELECTED,
    )  # fmt: skip
    if WRITES:
        if rank != own:
            tl.debug_barrier()
            ahead = 0.0
            if PREDICTS and FITTED:
                ahead = fitted_gain(totals, gains, kv, count, LARGEST, SUMS)
            elif PREDICTS:
                ahead = tl.load(gains + kv)
            write_turned(
                value, velocity, matrices, out, rank, kv_image, kv, part, token, batch, tokens, heads, ranks, ahead,
                D, SPLIT, COLUMNS, CHUNK, ROWS, UNITS, TURNS, PREDICTS,
            )  # fmt: skip


def launch_read_adaptive(
    received: torch.Tensor,
    table: torch.Tensor,
    age: torch.Tensor | None,
    indices_at: int,
    coded_at: int,
    count: int,
    upgrades: list[int],
    rows: list[int],
    width: int,
    batch: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find how everybody's payloads are coded, and advance the ages.

    Args:
        received, table, age, indices_at, coded_at, count: as for `otil_xdit.method.kernels.copies.correct_copies`.
        upgrades, rows: of the codec; see `AdaptiveCodec.kernel_arguments`.
        width, batch, tokens: C, B and S.

    Returns:
        What `read_plans` returns but for entries: words, slots and shares, each [l, N, ...].
    """
    sizes_at = coded_at + 2 * batch * (count * table.shape[1] if count else tokens)
    words, _, slots, share = read_plans(
        received, upgrades, sizes_at, rows, width, False, table if count else None, age, indices_at, count, tokens
    )
    return words, slots, share


def launch_advance_adaptive(
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    received: torch.Tensor,
    words: torch.Tensor,
    slots: torch.Tensor,
    share: torch.Tensor,
    scales: torch.Tensor,
    coded_at: int,
    sent: int,
    fitted: bool,
    constant: float,
    damping: float,
    rows: list[int],
    whose: int,
    own: int,
    matrices: torch.Tensor | None,
    out: torch.Tensor | None,
    heads: int,
    totals: torch.Tensor | None,
    gains: torch.Tensor | None,
) -> None:
    """Advance the copies of a run of layers by one step, with everybody's payloads.

    Args:
        value, velocity: [l, N, 2, B, S, C]; no velocity where nothing is extrapolated.
        received: uint8 [N, l, size], each rank's layers next to each other.
        words, slots, share: of `launch_read_adaptive`; without numbers in the latter where all tokens were sent.
        scales, coded_at, fitted, constant, damping: as for `otil_xdit.method.kernels.copies.correct_copies`.
        sent: tokens of a payload.
        rows: bytes of a key's codes, and of a value's.
        whose: `ALL`, `OWN` for this rank's copies, or `OTHERS`.
        own: this rank.
        matrices, out, heads: as for `otil_xdit.method.kernels.others.write_others`, to write the corrected copies of
            one layer there at once; nothing is written without `out`.
        totals: one layer's of `ChangeSums`, which the gain is fitted by, beginning with `gains`; None to take these.
        gains: float32 [2], by which these are extrapolated to the next step first; None not to.
    """
    layers, ranks, _, batch, tokens, width = value.shape
    tiles = Tiles.of(batch, tokens)
    constants, writes = tiles.constants(heads, width // heads), out is not None
    parts = tiles.parts if writes else 1
    rows_each, features = (tiles.rows, 64) if writes else (_TOKENS, min(256, triton.next_power_of_2(width)))
    corrected = {ALL: ranks, OWN: 1, OTHERS: ranks - 1}[whose]
    _advance_adaptive[(triton.cdiv(tokens, rows_each) * parts, 2 * batch, layers * corrected)](
        value, value if velocity is None else stored(velocity), received, slots, share, words, scales,
        scales if totals is None else totals, scales if gains is None else gains,
        value if matrices is None else matrices, value if out is None else out,
        ranks, layers, batch, tokens, received.stride(1), received.stride(0), sent, coded_at,
        coded_at + 2 * batch * sent + 2 * width, *rows, constant, damping, heads, own,
        0 if totals is None else totals.shape[1],
        C=width, FEATURES=features, TOKENS=rows_each, PARTS=parts,
        WIDTH=constants["UNITS"] // constants["SPLIT"] * constants["D"] if writes else width,
        BITS_AT=BITS_AT, SIZE_AT=SIZE_AT, MOVES=velocity is not None, FITTED=fitted, SELECTED=slots.numel() > 0,
        WHOSE=whose, WRITES=writes, PREDICTS=gains is not None, TURNS=matrices is not None, **constants,
        LARGEST=LARGEST_GAIN, SUMS=_PARTS, num_stages=1,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


read_adaptive = torch.library.custom_op("otil_xdit::read_adaptive", launch_read_adaptive, mutates_args=("age",))
"""`launch_read_adaptive`, as an operator of torch."""

advance_adaptive = torch.library.custom_op(
    "otil_xdit::advance_adaptive", launch_advance_adaptive, mutates_args=("value", "velocity", "out")
)
"""`launch_advance_adaptive`, as an operator of torch."""


@read_adaptive.register_fake
def _(
    received: torch.Tensor,
    table: torch.Tensor,
    age: torch.Tensor | None,
    indices_at: int,
    coded_at: int,
    count: int,
    upgrades: list[int],
    rows: list[int],
    width: int,
    batch: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranks, layers, _ = received.shape
    marked = layers, ranks, tokens if count else 0
    words = received.new_empty(layers, ranks, 2, width, dtype=torch.int32)
    return words, words.new_empty(marked), words.new_empty(marked, dtype=torch.float32)


@advance_adaptive.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
