"""The copies of keys and values of all patches: corrected by payloads, extrapolated, and how far the own ones moved.

`correct_copies` does what `PayloadCodec.unpack` and `Predictor.apply_residuals` do, `predict_copies` what
`Predictor.predict` does, `fitted_gain` what `Predictor.gain` does. Copies are read and written once. A scale for each
channel of a payload would be one more factor of `residual` in `_correct`.

Over 300 lines, as each kernel has a launcher and an operator, whose arguments stand in both.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent a
step, m = k * T tokens, V = 2 * B * m vectors of a layer's payload, R bytes of a vector's codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_GAIN: tl.constexpr = tl.constexpr(1.25)

_COLUMNS = 1024
"""Features that one program works on, at most."""

_PARTS = 64
"""Programs that share a layer's keys, or values, for its gain."""


@triton.jit
def _mark_sent(
    received, table, age, slots, share, TOKENS: tl.constexpr, T: tl.constexpr, SENT: tl.constexpr,
    layers, size, indices_at, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one layer and rank: each token's place among the sent ones or -1, its share of a correction, its new age.

    received: uint8 [N, l, size]; table: int64 [K, T]; age, share: float32 [l, N, S]; slots: int32 [l, N, S].
    """
    layer, rank, ranks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    indices = (received + (rank * layers + layer).to(tl.int64) * size + indices_at).to(tl.pointer_type(tl.int32))
    row = (layer * ranks + rank).to(tl.int64) * TOKENS
    lane = tl.arange(0, BLOCK)
    for start in range(0, TOKENS, BLOCK):
        tl.store(slots + row + start + lane, -1, mask=start + lane < TOKENS)
    tl.debug_barrier()
    for start in range(0, SENT, BLOCK):
        place = start + lane
        inside = place < SENT
        block = tl.load(indices + place // T, mask=inside, other=0)
        token = tl.load(table + block.to(tl.int64) * T + place % T, mask=inside, other=0)
        tl.store(slots + row + token, place, mask=inside)  # a token that is sent twice is sent alike
    tl.debug_barrier()
    for start in range(0, TOKENS, BLOCK):
        place = start + lane
        inside = place < TOKENS
        old = tl.load(age + row + place, mask=inside, other=1.0)
        sent = tl.load(slots + row + place, mask=inside, other=-1) >= 0
        tl.store(share + row + place, 1.0 / old, mask=inside)
        tl.store(age + row + place, tl.where(sent, 1.0, old + 1.0), mask=inside)


@triton.jit
def _correct(
    value, velocity, received, slots, share, levels, scales,
    layers, batch, tokens, size, coded_at, sent_tokens, constant, damping,
    C: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    MOVES: tl.constexpr, FITTED: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """One vector: a token of one layer, rank, key or value, and image.

    value, velocity: [l, N, 2, B, S, C]; received: uint8 [N, l, size]; slots, share: [l, N, S].
    """
    token, kv_image, layer_rank = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ranks = tl.num_programs(2) // layers
    layer, rank = layer_rank // ranks, layer_rank % ranks
    payload = received + (rank * layers + layer).to(tl.int64) * size
    gain = constant
    if FITTED:
        gain = tl.load(payload.to(tl.pointer_type(tl.float32)) + kv_image // batch)
    slot, given, kept = token, 1.0, 1.0
    if SELECTED:
        slot = tl.load(slots + layer_rank.to(tl.int64) * tokens + token)
        given = tl.load(share + layer_rank.to(tl.int64) * tokens + token)
        kept = tl.where(slot >= 0, 1.0, damping)
    is_sent = slot >= 0
    vector = kv_image * sent_tokens + tl.where(is_sent, slot, 0)
    byte = tl.load(payload + coded_at + vector).to(tl.int32)
    scale = tl.where(is_sent, tl.load(scales + byte), 0.0)
    codes = payload + coded_at + (tl.num_programs(1) * sent_tokens + vector * R)
    row = ((layer_rank * tl.num_programs(1) + kv_image).to(tl.int64) * tokens + token) * C
    PER: tl.constexpr = 8 // BITS
    for start in range(0, C, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < C
        packed = tl.load(codes + column // PER, mask=inside, other=0).to(tl.int32)
        code = (packed >> ((column % PER) * BITS)) & ((1 << BITS) - 1)
        level = tl.load(levels + code, mask=inside, other=0.0)
        v = tl.load(value + row + column, mask=inside, other=0.0).to(tl.float32)
        residual = level * scale
        if MOVES:
            u = tl.load(velocity + row + column, mask=inside, other=0.0).to(tl.float32)
            v += u * gain
            u = u * (gain * kept) + level * (scale * given)
            tl.store(velocity + row + column, u.to(velocity.dtype.element_ty), mask=inside)
        v += residual
        tl.store(value + row + column, v.to(value.dtype.element_ty), mask=inside)


@triton.jit
def _predict(
    value, velocity, gain, fresh, out, batch, tokens, own,
    C: tl.constexpr, COLUMNS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """One vector: a token of one rank, key or value, and image; this rank's own are its fresh ones.

    value, velocity: [N, 2, B, S, C]; gain: float32 [2]; fresh: [2, B, S, C]; out: [2, B, N, S, C].
    """
    token, kv_image, rank = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = ((rank * tl.num_programs(1) + kv_image).to(tl.int64) * tokens + token) * C
    own_row = (kv_image.to(tl.int64) * tokens + token) * C
    place = ((kv_image * tl.num_programs(2) + rank).to(tl.int64) * tokens + token) * C
    now = 0.0
    if MOVES:
        now = tl.load(gain + kv_image // batch)
    for start in range(0, C, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < C
        mine = inside & (rank + column * 0 == own)
        theirs = inside & (rank + column * 0 != own)
        v = tl.load(value + row + column, mask=theirs, other=0.0).to(tl.float32)
        if MOVES:
            v += tl.load(velocity + row + column, mask=theirs, other=0.0).to(tl.float32) * now
        v += tl.load(fresh + own_row + column, mask=mine, other=0.0).to(tl.float32)
        tl.store(out + place + column, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_moves(fresh, value, velocity, partial, count, BLOCK: tl.constexpr):
    """Sums over a part of the keys, or values: of change times velocity, and of the velocity's squares.

    fresh, value, velocity: [2, count]; partial: float32 [2, parts, 2].
    """
    kv, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    along = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    base = kv.to(tl.int64) * count
    for start in range(part * BLOCK, count, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        u = tl.load(velocity + base + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(fresh + base + at, mask=inside, other=0.0).to(tl.float32)
        change -= tl.load(value + base + at, mask=inside, other=0.0).to(tl.float32)
        along += change * u
        square += u * u
    tl.store(partial + (kv * parts + part) * 2, tl.sum(along, 0))
    tl.store(partial + (kv * parts + part) * 2 + 1, tl.sum(square, 0))


@triton.jit
def _finish_gain(partial, gain, LARGEST: tl.constexpr, PARTS: tl.constexpr):
    """The gain of the keys, or values, from the sums of their parts."""
    kv = tl.program_id(0)
    at = partial + (kv * PARTS + tl.arange(0, PARTS)) * 2
    along, square = tl.sum(tl.load(at), 0), tl.sum(tl.load(at + 1), 0)
    found = along / tl.maximum(square, 1e-30)
    tl.store(gain + kv, tl.minimum(tl.maximum(found, 0.0), LARGEST))


def launch_correct_copies(
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    age: torch.Tensor | None,
    received: torch.Tensor,
    table: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    indices_at: int,
    coded_at: int,
    count: int,
    fitted: bool,
    constant: float,
    damping: float,
) -> None:
    """Advance the copies of a run of layers by one step, with everybody's payloads of residuals.

    Args:
        value, velocity: [l, N, 2, B, S, C]; no velocity where nothing is extrapolated.
        age: steps since a token was sent, float32 [l, N, S]; None where all always are.
        received: uint8 [N, l, size], a multiple of 16 bytes each.
        table: the tokens of each sub-block, int64 [K, T].
        levels, scales: what codes and scales' bytes stand for, float32 [2**bits] and [256].
        indices_at, coded_at: where in a payload the sub-blocks' numbers and the coded tokens begin.
        count: sub-blocks sent, k; 0 for all tokens.
        fitted: whether the payloads begin with the senders' gains; otherwise they are `constant`.
        damping: what is left of the velocity of a token that was not sent.
    """
    layers, ranks, _, batch, tokens, width = value.shape
    size, block_tokens = received.shape[-1], table.shape[1]
    bits = levels.numel().bit_length() - 1
    sent = count * block_tokens if count else tokens
    slots = share = received  # not read
    if count:
        slots = torch.empty(layers, ranks, tokens, dtype=torch.int32, device=value.device)
        share = torch.empty(layers, ranks, tokens, dtype=torch.float32, device=value.device)
        ages = torch.ones_like(share) if age is None else age
        _mark_sent[(layers, ranks)](
            received, table, ages, slots, share, tokens, block_tokens, sent, layers, size, indices_at, BLOCK=1024
        )
    _correct[(tokens, 2 * batch, layers * ranks)](
        value, value if velocity is None else velocity, received, slots, share, levels, scales,
        layers, batch, tokens, size, coded_at, sent, constant, damping,
        C=width, R=-(-width * bits // 8), BITS=bits, COLUMNS=min(_COLUMNS, triton.next_power_of_2(width)),
        MOVES=velocity is not None, FITTED=fitted, SELECTED=count > 0,
    )  # fmt: skip


correct_copies = torch.library.custom_op(
    "otil_xdit::correct_copies", launch_correct_copies, mutates_args=("value", "velocity", "age")
)
"""`launch_correct_copies`, as an operator of torch."""


@correct_copies.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


def launch_predict_copies(
    value: torch.Tensor,
    velocity: torch.Tensor | None,
    gain: torch.Tensor,
    fresh: torch.Tensor,
    out: torch.Tensor,
    own: int,
) -> None:
    """Write all ranks' keys and values of this step as attention reads them.

    Args:
        value, velocity: of one layer, [N, 2, B, S, C]; no velocity where nothing is extrapolated.
        gain: of keys and values, float32 [2].
        fresh: this rank's, [2, B, S, C].
        out: [2, B, N, S, C], contiguous.
        own: this rank.
    """
    ranks, _, batch, tokens, width = value.shape
    _predict[(tokens, 2 * batch, ranks)](
        value, value if velocity is None else velocity, gain, fresh, out, batch, tokens, own,
        C=width, COLUMNS=min(_COLUMNS, triton.next_power_of_2(width)), MOVES=velocity is not None,
    )  # fmt: skip


predict_copies = torch.library.custom_op("otil_xdit::predict_copies", launch_predict_copies, mutates_args=("out",))
"""`launch_predict_copies`, as an operator of torch."""


@predict_copies.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


def launch_fitted_gain(value: torch.Tensor, velocity: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Return how far this rank's keys and values have moved in velocities, float32 [2].

    Args:
        value, velocity: this rank's copies of one layer, [2, B, S, C], contiguous.
        fresh: what it is called with, [2, B, S, C], contiguous.
    """
    partial = torch.empty(2, _PARTS, 2, dtype=torch.float32, device=value.device)
    gain = torch.empty(2, dtype=torch.float32, device=value.device)
    _sum_moves[(2, _PARTS)](fresh, value, velocity, partial, value.numel() // 2, BLOCK=1024)
    _finish_gain[(2,)](partial, gain, LARGEST=LARGEST_GAIN, PARTS=_PARTS)
    return gain


fitted_gain = torch.library.custom_op("otil_xdit::fitted_gain", launch_fitted_gain, mutates_args=())
"""`launch_fitted_gain`, as an operator of torch."""


@fitted_gain.register_fake
def _(value: torch.Tensor, velocity: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    return value.new_empty(2, dtype=torch.float32)
