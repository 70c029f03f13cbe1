"""The copies of keys and values of all patches, corrected by payloads in the adaptive codec.

`correct_adaptive` does what `AdaptiveCodec.decode_at` and `Predictor.apply_residuals` do, and what `Coordinates.back`
does where attention waits for the result. Copies are read and written once. `otil_xdit.method.kernels.bits` finds how
the payloads are coded, and its words are read here.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent, m =
k * T tokens, V = 2 * B * m vectors of a layer's payload, R bytes of a row of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.bits import BITS_AT, SIZE_AT, read_plans, step_of
from otil_xdit.method.kernels.others import write_turned
from otil_xdit.method.kernels.tiles import Tiles

_TOKENS = 4
"""Tokens that a program corrects: what it knows of features is read for all of them at once."""


@triton.jit
def _correct_adaptive(
    value, velocity, received, slots, share, words, scales,
    matrices, out, layers, batch, tokens, size, sent, scales_at, codes_at, key_row, value_row, constant, damping,
    heads, own,
    C: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr, MOVES: tl.constexpr, FITTED: tl.constexpr, SELECTED: tl.constexpr,
    WRITES: tl.constexpr, TURNS: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a part of the features, `WIDTH` wide, of one layer, rank, key or value, and image.

    matrices, out: of `otil_xdit.method.kernels.others`, where the corrected copies of other ranks go at once.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    kv_image, layer_rank = tl.program_id(1), tl.program_id(2)
    ranks = tl.num_programs(2) // layers
    layer, rank = layer_rank // ranks, layer_rank % ranks
    kv = kv_image // batch
    token = tile * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    payload = received + (rank * layers + layer).to(tl.int64) * size
    gain = constant
    if FITTED:
        gain = tl.load(payload.to(tl.pointer_type(tl.float32)) + kv)
    slot = token
    given = tl.full((TOKENS,), 1.0, tl.float32)
    kept = tl.full((TOKENS,), 1.0, tl.float32)
    is_sent = there
    if SELECTED:
        of_token = layer_rank.to(tl.int64) * tokens + token
        slot = tl.load(slots + of_token, mask=there, other=-1)
        given = tl.load(share + of_token, mask=there, other=0.0)
        is_sent = slot >= 0
        kept = tl.where(is_sent, 1.0, damping)
    vector = kv_image * sent + tl.where(is_sent, slot, 0)
    byte = tl.load(payload + scales_at + vector, mask=is_sent, other=0).to(tl.int32)
    scale = tl.where(is_sent, tl.load(scales + byte), 0.0)
    length = tl.where(kv == 0, key_row, value_row)
    rows = payload + codes_at + tl.where(kv == 0, 0, batch * sent * key_row)
    rows += (vector - kv * batch * sent) * length
    of_part = (layer_rank * 2 + kv).to(tl.int64) * C
    row = ((layer_rank * tl.num_programs(1) + kv_image).to(tl.int64) * tokens + token) * C
    last = min(part * WIDTH + WIDTH, C)
    for start in range(part * WIDTH, last, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        word = tl.load(words + of_part + feature, mask=feature < last, other=0)
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
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        if MOVES:
            u = tl.load(velocity + at, mask=inside, other=0.0).to(tl.float32)
            v += u * gain
            u = u * (gain * kept)[:, None] + level * (scale * given)[:, None]
            tl.store(velocity + at, u.to(velocity.dtype.element_ty), mask=inside)
        v += level * scale[:, None]
        tl.store(value + at, v.to(value.dtype.element_ty), mask=inside)
    if WRITES:
        if rank != own:
            tl.debug_barrier()
            write_turned(
                value, value, matrices, out, rank, kv_image, kv, part, token, batch, tokens, heads, ranks, 0.0,
                D, SPLIT, COLUMNS, CHUNK, ROWS, UNITS, TURNS, False,
            )  # fmt: skip


def launch_correct_adaptive(
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    age: torch.Tensor | None,
    received: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    indices_at: int,
    coded_at: int,
    count: int,
    fitted: bool,
    constant: float,
    damping: float,
    upgrades: list[int],
    rows: list[int],
    matrices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    heads: int = 1,
    own: int = 0,
) -> None:
    """Advance the copies of a run of layers by one step, with everybody's payloads in the adaptive codec.

    Args:
        value, velocity: [l, N, 2, B, S, C]; no velocity where nothing is extrapolated.
        age, received, table, scales, indices_at, coded_at, count, fitted, constant, damping: as for
            `otil_xdit.method.kernels.copies.correct_copies`.
        upgrades, rows: of the codec; see `AdaptiveCodec.kernel_arguments`.
        matrices, out, heads, own: as for `otil_xdit.method.kernels.others.write_others`, to write the corrected copies
            of one layer there at once; nothing is written without `out`.
    """
    layers, ranks, _, batch, tokens, width = value.shape
    sent = count * table.shape[1] if count else tokens
    sizes_at = coded_at + 2 * batch * sent
    words, _, slots, share = read_plans(
        received, upgrades, sizes_at, rows, width, False, table if count else None, age, indices_at, count, tokens
    )
    tiles = Tiles.of(batch, tokens)
    constants, writes = tiles.constants(heads, width // heads), out is not None
    parts = tiles.parts if writes else 1
    rows_each, features = (tiles.rows, 64) if writes else (_TOKENS, min(256, triton.next_power_of_2(width)))
    _correct_adaptive[(triton.cdiv(tokens, rows_each) * parts, 2 * batch, layers * ranks)](
        value, value if velocity is None else velocity, received, slots, share, words, scales,
        value if matrices is None else matrices, value if out is None else out,
        layers, batch, tokens, received.shape[-1], sent, coded_at, sizes_at + 2 * width, *rows, constant, damping,
        heads, own,
        C=width, FEATURES=features, TOKENS=rows_each, PARTS=parts,
        WIDTH=constants["UNITS"] // constants["SPLIT"] * constants["D"] if writes else width,
        BITS_AT=BITS_AT, SIZE_AT=SIZE_AT, MOVES=velocity is not None, FITTED=fitted, SELECTED=count > 0,
        WRITES=writes, TURNS=matrices is not None, **constants, num_stages=1,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


correct_adaptive = torch.library.custom_op(
    "otil_xdit::correct_adaptive", launch_correct_adaptive, mutates_args=("value", "velocity", "age", "out")
)
"""`launch_correct_adaptive`, as an operator of torch."""


@correct_adaptive.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
