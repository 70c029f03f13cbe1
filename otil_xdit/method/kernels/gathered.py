"""The copies of keys and values of all patches, replaced at a synchronous step, which brings everybody's.

`set_coded` does what `Quantised.decode`, `Predictor.set_values` and `Coordinates.back` do with coded changes since the
step before; `set_gathered` what `Coordinates.into` and `Predictor.set_values` do with the values themselves. Copies are
read and written once.

Shapes: N patches, B batch, H heads, S tokens of one patch, d features of a head, C = H * d, R bytes of a vector's
codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.others import write_turned
from otil_xdit.method.kernels.tiles import Tiles
from otil_xdit.method.kernels.velocities import load_velocity, store_velocity, stored


@triton.jit
def _replace(value, velocity, at, inside, old, new, steps, KNOWN: tl.constexpr, MOVES: tl.constexpr):
    """Replace copies, `old`, by new values; velocities follow, or become 0 where nothing was known."""
    if MOVES:
        faster = tl.zeros_like(new)
        if KNOWN:
            before = load_velocity(velocity, at, inside)
            faster = (new - old - before) / steps + before
        store_velocity(velocity, at, faster, inside)
    tl.store(value + at, new.to(value.dtype.element_ty), mask=inside)


@triton.jit
def _old(value, at, inside, new, KNOWN: tl.constexpr):
    """Return the copies, float32, or 0 in the shape of `new` where nothing was known."""
    if KNOWN:
        return tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
    return tl.zeros_like(new)


@triton.jit
def _set_coded(
    value, velocity, age, received, levels, scales, matrices, out, batch, tokens, size, heads, own,
    C: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, KNOWN: tl.constexpr, MOVES: tl.constexpr, AGED: tl.constexpr, TURNS: tl.constexpr,
    D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a part of the features, `WIDTH` wide, of one rank, key or value, and image.

    value, velocity: [N, 2, B, S, C]; age: float32 [N, S]; received: uint8 [N, size]; others as of `write_turned`.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    kv_image, rank = tl.program_id(1), tl.program_id(2)
    token = tile * ROWS + tl.arange(0, ROWS)
    there = token < tokens
    payload = received + rank.to(tl.int64) * size
    vector = kv_image * tokens + token
    byte = tl.load(payload + vector, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales + byte)[:, None]
    codes = (payload + (tl.num_programs(1) * tokens + vector * R))[:, None]
    row = ((rank * tl.num_programs(1) + kv_image).to(tl.int64) * tokens + token)[:, None] * C
    steps = tl.full((ROWS, 1), 1.0, tl.float32)
    if AGED:
        steps = tl.load(age + rank * tokens + token, mask=there, other=1.0)[:, None]
    PER: tl.constexpr = 8 // BITS
    last = min(part * WIDTH + WIDTH, C)
    for start in range(part * WIDTH, last, FEATURES):
        feature = (start + tl.arange(0, FEATURES))[None, :]
        inside = there[:, None] & (feature < last)
        packed = tl.load(codes + feature // PER, mask=inside, other=0).to(tl.int32)
        code = (packed >> ((feature % PER) * BITS)) & ((1 << BITS) - 1)
        new = tl.load(levels + code, mask=inside, other=0.0) * scale
        old = _old(value, row + feature, inside, new, KNOWN)
        _replace(value, velocity, row + feature, inside, old, old + new, steps, KNOWN, MOVES)
    if rank != own:
        tl.debug_barrier()
        write_turned(
            value, value, matrices, out, rank, kv_image, kv_image // batch, part, token, batch, tokens, heads,
            tl.num_programs(2), 0.0, D, SPLIT, COLUMNS, CHUNK, ROWS, UNITS, TURNS, False,
        )  # fmt: skip


def launch_set_coded(
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    age: torch.Tensor | None,
    known: bool,
    received: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    matrices: torch.Tensor | None,
    out: torch.Tensor,
    heads: int,
    own: int,
) -> None:
    """Replace the copies of one layer by what everybody's coded changes make of them, for attention, too.

    Args:
        value, velocity: become the new ones, [N, 2, B, S, C]; no velocity where nothing is extrapolated.
        age: steps since a token's last value, float32 [N, S]; None where that is 1.
        known: whether the copies are those of an earlier step; otherwise the changes are the values, and nothing moves.
        received: everybody's codes, uint8 [N, size], as `Quantised` writes them.
        levels, scales: what codes and scales' bytes stand for, float32 [2**bits] and [256].
        matrices, out, heads, own: as for `otil_xdit.method.kernels.others.write_others`.
    """
    ranks, _, batch, tokens, width = value.shape
    bits = levels.numel().bit_length() - 1
    tiles = Tiles.of(batch, tokens)
    constants = tiles.constants(heads, width // heads)
    _set_coded[(tiles.tiles * tiles.parts, tiles.images, ranks)](
        value, value if velocity is None else stored(velocity), scales if age is None else age, received, levels,
        scales, value if matrices is None else matrices, out, batch, tokens, received.shape[-1], heads, own,
        C=width, R=-(-width * bits // 8), BITS=bits, FEATURES=64, PARTS=tiles.parts,
        WIDTH=constants["UNITS"] // constants["SPLIT"] * constants["D"], KNOWN=known, MOVES=velocity is not None,
        AGED=age is not None, TURNS=matrices is not None, **constants, num_stages=1,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


@triton.jit
def _set_gathered(
    gathered, value, velocity, age, matrices, out, batch, tokens, heads, ranks,
    KNOWN: tl.constexpr, MOVES: tl.constexpr, AGED: tl.constexpr, TURNS: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Some tokens of some heads of one rank's keys, or values, of one image.

    gathered, value, velocity: [N, 2, B, S, C]; age: float32 [N, S]; matrices: float32 [2, H, d, d]; out: [2, B, N, S,
    C].
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    rank, kv_image = tl.program_id(2) // (2 * batch), tl.program_id(2) % (2 * batch)
    kv = kv_image // batch
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < tokens)[:, None]
    source = ((rank * 2 * batch + kv_image).to(tl.int64) * tokens + row[:, None]) * (heads * D)
    place = ((kv_image * ranks + rank).to(tl.int64) * tokens + row[:, None]) * (heads * D)
    steps = tl.full((ROWS, 1), 1.0, tl.float32)
    if AGED:
        steps = tl.load(age + rank * tokens + row, mask=row < tokens, other=1.0)[:, None]
    for unit in range(part * UNITS, min(part * UNITS + UNITS, heads * SPLIT)):
        head, first = unit // SPLIT, (unit % SPLIT) * COLUMNS
        column = (first + tl.arange(0, COLUMNS))[None, :]
        there = inside & (column < D)
        at = source + head * D + column
        given = tl.load(gathered + at, mask=there, other=0.0)
        tl.store(out + place + head * D + column, given.to(out.dtype.element_ty), mask=there)
        new = given.to(tl.float32)
        if TURNS:
            new = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, D, CHUNK):
                feature = start + tl.arange(0, CHUNK)
                known = inside & (feature < D)[None, :]
                factor = tl.load(gathered + source + head * D + feature[None, :], mask=known, other=0.0)
                known = (feature < D)[:, None] & (column < D)
                of_head = ((kv * heads + head) * D + feature[:, None]) * D + column
                matrix = tl.load(matrices + of_head, mask=known, other=0.0)
                new = tl.dot(factor.to(tl.float32), matrix, new, input_precision="tf32x3")
        old = _old(value, at, there, new, KNOWN and MOVES)
        _replace(value, velocity, at, there, old, new, steps, KNOWN, MOVES)


def launch_set_gathered(
    gathered: torch.Tensor,
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    age: torch.Tensor | None,
    known: bool,
    matrices: torch.Tensor | None,
    out: torch.Tensor,
    heads: int,
) -> None:
    """Replace the copies of one layer by everybody's keys and values, and write these for attention.

    Args:
        gathered: keys and values, [N, 2, B, S, C].
        value, velocity, age, known: as for `launch_set_coded`.
        matrices: of `Coordinates.into`, float32 [2, H, d, d]; None where copies are keys and values themselves.
        out: becomes the keys and values, [2, B, N, S, C], contiguous.
        heads: H.
    """
    ranks, _, batch, tokens, width = value.shape
    tiles = Tiles.of(batch, tokens)
    _set_gathered[(tiles.tiles, tiles.parts, ranks * tiles.images)](
        gathered, value, value if velocity is None else stored(velocity), value if age is None else age,
        value if matrices is None else matrices, out, batch, tokens, heads, ranks,
        KNOWN=known, MOVES=velocity is not None, AGED=age is not None, TURNS=matrices is not None,
        **tiles.constants(heads, width // heads), num_stages=1,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


set_coded = torch.library.custom_op("otil_xdit::set_coded", launch_set_coded, mutates_args=("value", "velocity", "out"))
"""`launch_set_coded`, as an operator of torch."""

set_gathered = torch.library.custom_op(
    "otil_xdit::set_gathered", launch_set_gathered, mutates_args=("value", "velocity", "out")
)
"""`launch_set_gathered`, as an operator of torch."""


@set_coded.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


@set_gathered.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
