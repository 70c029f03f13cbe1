"""The other ranks' keys and values as attention reads them: extrapolated to this step, and out of their coordinates.

`write_others` does what `Predictor.predict` and `Coordinates.back` do, in one pass over the copies.

Shapes: N patches, B batch, H heads, S tokens of one patch, d features of a head, C = H * d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.tiles import Tiles
from otil_xdit.method.kernels.velocities import load_velocity, stored
from otil_xdit.method.predictor import MOST_GAIN

LARGEST_GAIN: tl.constexpr = tl.constexpr(MOST_GAIN)

_PARTS = 512
"""Sums that are added at once to find a gain."""


@triton.jit
def fitted_gain(totals, gains, kv, count, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Return the gain of keys, or values: how far they moved along their velocity.

    totals: float32 [2, count, 2], of what a prediction with `gains`, [2], lacks.
    """
    along = tl.zeros((BLOCK,), tl.float32)
    speed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = totals + (kv * count + lane) * 2
        along += tl.load(at, mask=lane < count, other=0.0)
        speed += tl.load(at + 1, mask=lane < count, other=0.0)
    found = tl.load(gains + kv) + tl.sum(along, 0) / tl.maximum(tl.sum(speed, 0), 1e-30)
    return tl.minimum(tl.maximum(found, 0.0), LARGEST)


@triton.jit
def _moved(copies, velocities, at, there, gain, MOVES: tl.constexpr):
    """Return copies as they are extrapolated, float32."""
    found = tl.load(copies + at, mask=there, other=0.0).to(tl.float32)
    if MOVES:
        found += load_velocity(velocities, at, there) * gain
    return found


@triton.jit
def write_turned(
    copies, velocities, matrices, out, rank, kv_image, kv, part, row, batch, tokens, heads, ranks, gain,
    D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, TURNS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Write some tokens, `row`, of a part of the heads to where attention reads them."""
    inside = row < tokens
    source = ((rank * 2 * batch + kv_image).to(tl.int64) * tokens + row[:, None]) * (heads * D)
    place = ((kv_image * ranks + rank).to(tl.int64) * tokens + row[:, None]) * (heads * D)
    for unit in range(part * UNITS, min(part * UNITS + UNITS, heads * SPLIT)):
        head, first = unit // SPLIT, (unit % SPLIT) * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (column < D)[None, :]
        if TURNS:
            found = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, D, CHUNK):
                feature = start + tl.arange(0, CHUNK)
                known = inside[:, None] & (feature < D)[None, :]
                moved = _moved(copies, velocities, source + head * D + feature[None, :], known, gain, MOVES)
                known = (feature < D)[:, None] & (column < D)[None, :]
                at = ((kv * heads + head) * D + feature[:, None]) * D + column[None, :]
                matrix = tl.load(matrices + at, mask=known, other=0.0)
                found = tl.dot(moved, matrix, found, input_precision="tf32x3")
        else:
            found = _moved(copies, velocities, source + head * D + column[None, :], there, gain, MOVES)
        tl.store(out + place + head * D + column[None, :], found.to(out.dtype.element_ty), mask=there)


@triton.jit
def _write_others(
    copies, velocities, matrices, totals, gains, out, batch, tokens, heads, ranks, own, count,
    D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, TURNS: tl.constexpr, MOVES: tl.constexpr, FITTED: tl.constexpr, LARGEST: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Some tokens of some heads of one rank's keys, or values, of one image.

    copies, velocities: [N, 2, B, S, C]; matrices: float32 [2, H, d, d]; totals: of `ChangeSums`; gains: [2]; out:
    [2, B, N, S, C].
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    other, kv_image = tl.program_id(2) // (2 * batch), tl.program_id(2) % (2 * batch)
    rank = other + (other >= own).to(tl.int32)
    kv = kv_image // batch
    row = tile * ROWS + tl.arange(0, ROWS)
    gain = 0.0
    if FITTED:
        gain = fitted_gain(totals, gains, kv, count, LARGEST, PARTS)
    elif MOVES:
        gain = tl.load(gains + kv)
    write_turned(
        copies, velocities, matrices, out, rank, kv_image, kv, part, row, batch, tokens, heads, ranks, gain,
        D, SPLIT, COLUMNS, CHUNK, ROWS, UNITS, TURNS, MOVES,
    )  # fmt: skip


def launch_write_others(
    copies: torch.Tensor,
    velocities: torch.Tensor | None,
    matrices: torch.Tensor | None,
    totals: torch.Tensor | None,
    gains: torch.Tensor | None,
    out: torch.Tensor,
    heads: int,
    own: int,
) -> None:
    """Write the other ranks' keys and values of this step as attention reads them.

    Args:
        copies, velocities: of one layer, [N, 2, B, S, C]; no velocities to take the copies as they are.
        matrices: of `Coordinates.back`, float32 [2, H, d, d]; None where copies are keys and values themselves.
        totals: one layer's of `ChangeSums`, which the gain is fitted by, beginning with `gains`; None to take these.
        gains: float32 [2]; None without velocities.
        out: [2, B, N, S, C], contiguous; this rank's part is left as it is.
        heads: H.
        own: this rank.
    """
    ranks, _, batch, tokens, width = copies.shape
    tiles = Tiles.of(batch, tokens)
    _write_others[(tiles.tiles, tiles.parts, (ranks - 1) * tiles.images)](
        copies, copies if velocities is None else stored(velocities), copies if matrices is None else matrices,
        copies if totals is None else totals, copies if gains is None else gains, out,
        batch, tokens, heads, ranks, own, 0 if totals is None else totals.shape[1],
        **tiles.constants(heads, width // heads), TURNS=matrices is not None, MOVES=velocities is not None,
        FITTED=totals is not None, LARGEST=LARGEST_GAIN, PARTS=_PARTS, num_stages=1,
    )  # fmt: skip


write_others = torch.library.custom_op("otil_xdit::write_others", launch_write_others, mutates_args=("out",))
"""`launch_write_others`, as an operator of torch."""


@write_others.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
