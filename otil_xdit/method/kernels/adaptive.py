"""What a rank sends of its keys and values in the adaptive codec: residuals coded, by how much features vary.

`encode_adaptive` does what `PayloadCodec` and `AdaptiveCodec` do to fill a payload. How many bits a feature has is
found by `otil_xdit.method.kernels.bits`, whose words and entries are read here.

Shapes: l layers of a run; B batch, S tokens of this rank, C features, K sub-blocks of T tokens, k sent, m = k * T
tokens, V = 2 * B * m vectors of a layer's payload, R bytes of a row of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.bits import BITS_AT, SIZE_AT, read_plans, step_of
from otil_xdit.method.kernels.payloads import scale_byte, write_gains

_FEATURES = 32
"""Features of a program that adds up what is known of them."""

_VECTORS = 4
"""Vectors that a program codes: what it knows of features is read for all of them at once."""


@triton.jit
def _token_of(slot, inside, selected, table, layer, count, T: tl.constexpr, SELECTED: tl.constexpr):
    """Return the tokens of a payload's slots."""
    if SELECTED:
        block = tl.load(selected + layer * count + slot // T, mask=inside, other=0)
        return tl.load(table + block * T + slot % T, mask=inside, other=0)
    return slot.to(tl.int64)


@triton.jit
def _measure_features(
    sizes, payload, batch, tiles, size, sizes_at, octave, zero, root,
    C: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sizes of some features of one layer's keys, or values, from all tiles' sums of squares."""
    kv, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((FEATURES,), tl.float32)
    for start in range(0, batch * tiles, ROWS):
        one = start + tl.arange(0, ROWS)
        row = (layer * tiles + one // batch) * 2 * batch + kv * batch + one % batch
        inside = (one < batch * tiles)[:, None] & (feature < C)[None, :]
        total += tl.sum(tl.load(sizes + row[:, None] * C + feature[None, :], mask=inside, other=0.0), 0)
    byte = scale_byte(tl.sqrt(total) / root, octave, zero, False)
    at = payload + layer * size + sizes_at + kv * C + feature
    tl.store(at, byte.to(tl.uint8), mask=feature < C)


@triton.jit
def _encode_adaptive(
    residuals, gains, fitted, payload, selected, table, words, entries, scales,
    batch, tokens, size, sent, count, indices_at, scales_at, codes_at, key_row, value_row, octave, zero,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, BYTES: tl.constexpr, VECTORS: tl.constexpr,
    T: tl.constexpr, BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr, TRAVELS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Some vectors of a payload, of one layer's keys, or values, of one image."""
    kv_image, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv = kv_image // batch
    slot = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    there = slot < sent
    out = payload + layer * size
    if TRAVELS:
        if tl.program_id(0) == 0 and kv_image % batch == 0:
            write_gains(out, gains, fitted, layer, kv)
    token = _token_of(slot, there, selected, table, layer, count, T, SELECTED)
    if SELECTED:
        if kv_image == 0:
            block = tl.load(selected + layer * count + slot // T, mask=there, other=0)
            at = (out + indices_at).to(tl.pointer_type(tl.int32)) + slot // T
            tl.store(at, block.to(tl.int32), mask=there & (slot % T == 0))
    row = residuals + ((layer * tl.num_programs(1) + kv_image) * tokens + token).to(tl.int64) * C
    of_part = layer * 2 + kv
    square = tl.zeros((VECTORS,), tl.float32)
    coded = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, C, COLUMNS):
        feature = start + tl.arange(0, COLUMNS)
        word = tl.load(words + of_part * C + feature, mask=feature < C, other=0)
        has_bits = ((word >> BITS_AT) & 15) > 0
        size_of = tl.load(scales + (word >> SIZE_AT), mask=has_bits, other=1.0)
        inside = there[:, None] & has_bits[None, :]
        found = tl.load(row[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
        found = found * (1.0 / size_of)[None, :]
        square += tl.sum(found * found, 1)
        coded += has_bits.to(tl.int32)
    weight = tl.sqrt(tl.maximum(tl.sum(coded, 0), 1).to(tl.float32))
    byte = scale_byte(tl.sqrt(square) / weight, octave, zero, False)
    vector = kv_image * sent + slot
    tl.store(out + scales_at + vector, byte.to(tl.uint8), mask=there)
    scale = 1.0 / tl.load(scales + byte)
    length = tl.where(kv == 0, key_row, value_row)
    rows = out + codes_at + tl.where(kv == 0, 0, batch * sent * key_row)
    rows += (vector - kv * batch * sent) * length
    lane = tl.arange(0, 8)[None, :]
    for start in range(0, ROW, BYTES):
        place = start + tl.arange(0, BYTES)
        entry = tl.load(
            entries + of_part * (8 * ROW) + place[:, None] * 8 + lane, mask=(place < length)[:, None], other=-1
        )
        begins = entry >= 0
        bits = tl.where(begins, (entry >> BITS_AT) & 15, 0)
        size_of = tl.load(scales + (entry >> SIZE_AT), mask=begins, other=1.0)
        feature = (entry & 0xFFFF)[None, :, :]
        inside = there[:, None, None] & begins[None, :, :]
        found = tl.load(row[:, None, None] + feature, mask=inside, other=0.0).to(tl.float32)
        highest = (1 << bits) - 1
        middle = ((1 << bits) >> 1).to(tl.float32)
        factor = (1.0 / size_of) / tl.maximum(step_of(bits), 1e-9)
        code = found * factor[None, :, :] * scale[:, None, None] + middle[None, :, :]
        code = tl.minimum(tl.maximum(code, 0.0), highest.to(tl.float32)[None, :, :]).to(tl.int32)
        packed = tl.sum(tl.where(begins[None, :, :], code << lane[None, :, :], 0), 2)
        tl.store(rows[:, None] + place[None, :], packed.to(tl.uint8), mask=there[:, None] & (place < length)[None, :])


def launch_encode_adaptive(
    residuals: torch.Tensor,
    sizes: torch.Tensor,
    gains: torch.Tensor,
    fitted: torch.Tensor,
    payload: torch.Tensor,
    selected: torch.Tensor | None,
    table: torch.Tensor,
    scales: torch.Tensor,
    indices_at: int,
    coded_at: int,
    travels: bool,
    upgrades: list[int],
    rows: list[int],
    octave: float,
    zero: float,
) -> None:
    """Fill the payloads of a run of layers: gains, the numbers of sub-blocks, and residuals in the adaptive codec.

    Three launches: what is known of features is added up, their bits found from the bytes that say how large they are,
    and residuals coded.

    Args:
        residuals: what the others' prediction of this rank's values lacks, of a run of layers, [l, 2, B, S, C],
            contiguous.
        sizes: sums of its squares over some tokens each, float32 [l, tiles, 2 * B, C].
        gains: of that prediction, float32 [l, 2].
        fitted: of tokens that are not sent, float32 [l, 2].
        payload: uint8 [l, size].
        selected: sub-blocks that are sent, int64 [l, k], contiguous; None for all tokens.
        table: the tokens of each sub-block, int64 [K, T].
        scales: what the bytes of scales stand for, float32 [256].
        indices_at, coded_at: where in a payload the sub-blocks' numbers and the coded tokens begin.
        travels: whether gains do.
        upgrades, rows, octave, zero: of the codec; see `AdaptiveCodec.kernel_arguments`.
    """
    layers, _, batch, tokens, width = residuals.shape
    count = 0 if selected is None else selected.shape[1]
    side, size = table.shape[1], payload.shape[1]
    sent = count * side or tokens
    sizes_at = coded_at + 2 * batch * sent
    _measure_features[(triton.cdiv(width, _FEATURES), 2, layers)](
        sizes, payload, batch, sizes.shape[1], size, sizes_at, octave, zero, (batch * tokens) ** 0.5,
        C=width, FEATURES=_FEATURES, ROWS=64,
    )  # fmt: skip
    words, entries, _, _ = read_plans(payload[None], upgrades, sizes_at, rows, width, True, None, None, 0, 0, tokens)
    _encode_adaptive[(triton.cdiv(sent, _VECTORS), 2 * batch, layers)](
        residuals, gains, fitted, payload, table if selected is None else selected, table, words, entries, scales,
        batch, tokens, size, sent, count, indices_at, coded_at,
        sizes_at + 2 * width, *rows, octave, zero,
        C=width, COLUMNS=min(512, triton.next_power_of_2(width)), ROW=entries.shape[3] // 8,
        BYTES=min(64, triton.next_power_of_2(max(rows))), VECTORS=_VECTORS, T=side, BITS_AT=BITS_AT, SIZE_AT=SIZE_AT,
        TRAVELS=travels, SELECTED=selected is not None,
    )  # fmt: skip


encode_adaptive = torch.library.custom_op(
    "otil_xdit::encode_adaptive", launch_encode_adaptive, mutates_args=("payload",)
)
"""`launch_encode_adaptive`, as an operator of torch."""


@encode_adaptive.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
