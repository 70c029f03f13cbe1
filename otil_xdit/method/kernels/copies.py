"""The copies of keys and values of all patches, corrected by payloads of equally many bits for every number.

`correct_copies` does what `PayloadCodec.unpack` and `Predictor.apply_residuals` do. Copies are read and written once.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent a
step, m = k * T tokens, V = 2 * B * m vectors of a layer's payload, R bytes of a vector's codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.payloads import read_gains
from otil_xdit.method.kernels.velocities import load_velocity, store_velocity, stored

_COLUMNS = 1024
"""Features that one program works on, at most."""


@triton.jit
def advance_copies(value, velocity, at, inside, level, scale, gain, kept, given, MOVES: tl.constexpr):
    """Advance values and velocities by one step with residuals, ``level * scale``; see `Predictor` for the formulas."""
    v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
    if MOVES:
        u = load_velocity(velocity, at, inside)
        v += u * gain
        u = u * (gain * kept) + level * (scale * given)
        store_velocity(velocity, at, u, inside)
    v += level * scale
    tl.store(value + at, v.to(value.dtype.element_ty), mask=inside)


@triton.jit
def mark_sent(
    received, table, age, slots, share, layer, rank, ranks, layers, size, indices_at,
    TOKENS: tl.constexpr, T: tl.constexpr, SENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one layer and rank: each token's place among the sent ones or -1, its share of a correction, its new age.

    received: uint8 [N, l, size]; table: int64 [K, T]; age, share: float32 [l, N, S]; slots: int32 [l, N, S].
    """
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
def _mark_sent(
    received, table, age, slots, share, TOKENS: tl.constexpr, T: tl.constexpr, SENT: tl.constexpr,
    layers, size, indices_at, BLOCK: tl.constexpr,
):  # fmt: skip
    """`mark_sent` for each layer and rank."""
    layer, rank, ranks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    mark_sent(received, table, age, slots, share, layer, rank, ranks, layers, size, indices_at, TOKENS, T, SENT, BLOCK)


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
    gain, gain_of_others = constant, constant
    if FITTED:
        gain, gain_of_others = read_gains(payload, kv_image // batch)
    slot, given, kept = token, 1.0, 1.0
    if SELECTED:
        slot = tl.load(slots + layer_rank.to(tl.int64) * tokens + token)
        gain = tl.where(slot >= 0, gain, gain_of_others)
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
        advance_copies(value, velocity, row + column, inside, level, scale, gain, kept, given, MOVES)


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
        value, value if velocity is None else stored(velocity), received, slots, share, levels, scales,
        layers, batch, tokens, size, coded_at, sent, constant, damping,
        C=width, R=-(-width * bits // 8), BITS=bits, COLUMNS=min(_COLUMNS, triton.next_power_of_2(width)),
        MOVES=velocity is not None, FITTED=fitted, SELECTED=count > 0,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


correct_copies = torch.library.custom_op(
    "otil_xdit::correct_copies", launch_correct_copies, mutates_args=("value", "velocity", "age")
)
"""`launch_correct_copies`, as an operator of torch."""


@correct_copies.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
