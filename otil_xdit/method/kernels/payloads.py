"""What a rank sends of its keys and values: residuals, quantised and packed, in equally many bits for every number.

`encode_residuals` does what `PayloadCodec` and `Quantised` do to fill a payload.

Shapes: l layers of a run; B batch, S tokens of this rank, C features, K sub-blocks of T tokens, k sent, m = k * T
tokens, R bytes of a vector's codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LARGEST_STEP = tl.constexpr(127.0)
_SMALLEST_STEP = tl.constexpr(-128.0)
"""Bounds of a scale's byte, less the byte of scale 1."""


@triton.jit
def scale_byte(spread, octave, zero, UPWARDS: tl.constexpr):
    """Return the byte of a scale, int32, rounded up or to the nearest; see `otil_xdit.method.codec.write_scales`."""
    steps = tl.log2(spread) * octave
    steps = tl.ceil(steps) if UPWARDS else tl.floor(steps + 0.5)
    steps = tl.where(spread > 0, tl.minimum(tl.maximum(steps, _SMALLEST_STEP), _LARGEST_STEP), _SMALLEST_STEP)
    return (steps + zero).to(tl.int32)


@triton.jit
def write_gains(payload, gains, fitted, layer, kv):
    """Write the gains of a layer's keys, or values: of tokens that are sent, and of others, float32 [l, 2]."""
    at = payload.to(tl.pointer_type(tl.float16)) + kv
    tl.store(at, tl.load(gains + layer * 2 + kv).to(tl.float16))
    tl.store(at + 2, tl.load(fitted + layer * 2 + kv).to(tl.float16))


@triton.jit
def read_gains(payload, kv):
    """Return the gain of a payload's keys, or values, of tokens that were sent, and the one of others."""
    at = payload.to(tl.pointer_type(tl.float16)) + kv
    return tl.load(at).to(tl.float32), tl.load(at + 2).to(tl.float32)


@triton.jit
def _encode(
    residuals, gains, fitted, payload, selected, table, scales, borders,
    batch, tokens, size, indices_at, coded_at, count, octave, zero, width_root,
    step, middle, highest,
    C: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, R: tl.constexpr,
    TRAVELS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """One vector of a payload: payload, uint8 [l, size]; selected, int64 [l, k]."""
    slot, kv_image, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    out = payload + layer.to(tl.int64) * size
    if TRAVELS:
        if slot == 0 and kv_image % batch == 0:
            write_gains(out, gains, fitted, layer, kv_image // batch)
    token = slot.to(tl.int64)
    if SELECTED:
        block = tl.load(selected + layer * count + slot // T)
        token = tl.load(table + block * T + slot % T)
        if slot % T == 0 and kv_image == 0:
            tl.store((out + indices_at).to(tl.pointer_type(tl.int32)) + slot // T, block.to(tl.int32))
    PER: tl.constexpr = 8 // BITS
    lane = tl.arange(0, PER)[None, :]
    column = tl.arange(0, BYTES)[:, None] * PER + lane
    inside = column < C
    row = ((layer * tl.num_programs(1) + kv_image).to(tl.int64) * tokens + token) * C
    residual = tl.load(residuals + row + column, mask=inside, other=0.0).to(tl.float32)
    if BITS == 8:
        spread = tl.max(tl.max(tl.abs(residual), 1), 0)
    else:
        spread = tl.sqrt(tl.sum(tl.sum(residual * residual, 1), 0)) / width_root
    byte = scale_byte(spread, octave, zero, BITS == 8)
    vectors = tl.num_programs(1) * tl.num_programs(0)
    vector = kv_image * tl.num_programs(0) + slot
    tl.store(out + coded_at + vector, byte.to(tl.uint8))
    scale = tl.load(scales + byte)
    if BITS == 4:
        code = tl.zeros((BYTES, PER), tl.int32)
        for border in tl.static_range(15):
            code += (residual / scale > tl.load(borders + border)).to(tl.int32)
    else:
        places = residual * (1.0 / (scale * step)) + middle
        code = tl.minimum(tl.maximum(places, 0.0), highest).to(tl.int32)
    code = tl.where(inside, code, 0) << (lane * BITS)
    packed = tl.sum(code, 1)
    place = tl.arange(0, BYTES)
    tl.store(out + coded_at + vectors + vector * R + place, packed.to(tl.uint8), mask=place < R)


def launch_encode_residuals(
    residuals: torch.Tensor,
    gains: torch.Tensor | None,
    fitted: torch.Tensor | None,
    payload: torch.Tensor,
    selected: torch.Tensor | None,
    table: torch.Tensor,
    scales: torch.Tensor,
    borders: torch.Tensor,
    indices_at: int,
    coded_at: int,
    travels: bool,
    bits: int,
    octave: float,
    zero: float,
    step: float,
    middle: float,
    highest: float,
) -> None:
    """Fill the payloads of a run of layers: gains, the numbers of sub-blocks, scales and codes of residuals.

    Args:
        residuals: what the others' prediction of this rank's values lacks, [l, 2, B, S, C], contiguous.
        gains: of that prediction, float32 [l, 2]; None where they do not travel.
        fitted: of tokens that are not sent, float32 [l, 2]; None as gains.
        table: the tokens of each sub-block, int64 [K, T].
        payload: uint8 [l, size].
        selected: sub-blocks that are sent, int64 [l, k], contiguous; None for all tokens.
        scales: what the bytes of scales stand for, float32 [256].
        borders: between codes of 4 bits, float32 [15].
        indices_at, coded_at: where in a payload the sub-blocks' numbers and the coded tokens begin.
        travels: whether gains do.
        bits, octave, zero, step, middle, highest: of the codec; see `otil_xdit.method.codec.Quantised`.
    """
    layers, _, batch, tokens, width = residuals.shape
    count = 0 if selected is None else selected.shape[1]
    side = table.shape[1]
    row = -(-width * bits // 8)
    _encode[(count * side or tokens, 2 * batch, layers)](
        residuals, scales if gains is None else gains, scales if fitted is None else fitted, payload,
        table if selected is None else selected, table, scales, borders,
        batch, tokens, payload.shape[1], indices_at, coded_at, count, octave, zero, width**0.5,
        step, middle, highest,
        C=width, T=side, BITS=bits, BYTES=triton.next_power_of_2(row), R=row,
        TRAVELS=travels, SELECTED=selected is not None,
    )  # fmt: skip


encode_residuals = torch.library.custom_op(
    "otil_xdit::encode_residuals", launch_encode_residuals, mutates_args=("payload",)
)
"""`launch_encode_residuals`, as an operator of torch."""


@encode_residuals.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
