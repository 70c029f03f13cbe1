"""The bits of each feature of an adaptive payload, by reverse water-filling in whole numbers.

`read_plans` does what `plan_of` of `otil_xdit.method.bit_plan` does, and marks which tokens were sent;
`otil_xdit.method.kernels.adaptive` and `otil_xdit.method.kernels.adaptive_copies` do the rest.

A feature's *word* is all that its codes are read by: the place of the lowest bit in a row (16 bits), how many bits (4)
and its size's byte (8). An *entry* says the same of the code that begins at a bit of a row, with its feature in the
place of its place; -1 where none begins.

Shapes: l layers of a run; N patches, C features, V vectors of a payload, half of them keys; R bytes of a row of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.copies import mark_sent

BITS_AT, SIZE_AT = tl.constexpr(16), tl.constexpr(20)
"""Where in a word or an entry the number of bits, and the size's byte, begin."""

_LEVELS = tl.constexpr(512)
"""More than there are levels of what an upgrade gains."""


@triton.jit
def step_of(bits):
    """Return the distance of levels at scale 1: those of a normal distribution, see `AdaptiveCodec`."""
    small = tl.where(bits == 1, 1.5958, tl.where(bits == 2, 0.9957, 0.0))
    return tl.where(bits == 4, 0.3352, tl.where(bits == 8, 0.0308, small))


@triton.jit
def _bits_of(
    size, inside, budget, G1: tl.constexpr, G2: tl.constexpr, G4: tl.constexpr, G8: tl.constexpr, LEVELS: tl.constexpr
):
    """Return each feature's bits: upgrades are bought from the one that gains most on, until one is beyond the budget.

    Upgrades of equal gain are bought in the order of their features, so what is bought of them is found by their level.

    Args:
        size: the byte of each feature's size.
        inside: whether it is a feature.
        budget: bits in all.
        G1, G2, G4, G8: what each upgrade gains, in steps of a size's byte, falling; none of them positive.
    """
    bins = tl.arange(0, LEVELS)
    outside = LEVELS - 1
    first = tl.where(inside, size + G1 - G8, outside)
    second = tl.where(inside, size + G2 - G8, outside)
    third = tl.where(inside, size + G4 - G8, outside)
    fourth = tl.where(inside, size, outside)
    costs = tl.histogram(first, LEVELS) + tl.histogram(second, LEVELS)
    costs += 2 * tl.histogram(third, LEVELS) + 4 * tl.histogram(fourth, LEVELS)
    costs = tl.where(bins < outside, costs, 0)
    spent = tl.cumsum(costs, 0, reverse=True)
    # Of the highest level that is beyond the budget, some are bought.
    level = tl.sum((spent > budget).to(tl.int32), 0) - 1
    left = budget - tl.sum(tl.where(bins > level, costs, 0), 0)
    cost = tl.where(first == level, 1, 0) + tl.where(second == level, 1, 0)
    cost += tl.where(third == level, 2, 0) + tl.where(fourth == level, 4, 0)
    cost = tl.where(inside, cost, 0)
    found = tl.where(tl.cumsum(cost, 0) <= left, cost, 0)
    found += tl.where(first > level, 1, 0) + tl.where(second > level, 1, 0)
    found += tl.where(third > level, 2, 0) + tl.where(fourth > level, 4, 0)
    return tl.where(inside, found, 0)


@triton.jit
def _places_of(bits):
    """Return the place of each feature's code in a row: those of 8 bits come first, then those of 4, 2 and 1."""
    # Four counts in one number.
    eights, fours = (bits == 8).to(tl.int64), (bits == 4).to(tl.int64)
    twos, ones = (bits == 2).to(tl.int64), (bits == 1).to(tl.int64)
    members = eights + (fours << 16) + (twos << 32) + (ones << 48)
    before = tl.cumsum(members, 0) - members
    whole = tl.sum(members, 0)
    place = (before & 0xFFFF) * 8
    start = (whole & 0xFFFF) * 8
    place = tl.where(bits == 4, start + ((before >> 16) & 0xFFFF) * 4, place)
    start += ((whole >> 16) & 0xFFFF) * 4
    place = tl.where(bits == 2, start + ((before >> 32) & 0xFFFF) * 2, place)
    start += ((whole >> 32) & 0xFFFF) * 2
    place = tl.where(bits == 1, start + ((before >> 48) & 0xFFFF), place)
    return tl.where(bits > 0, place, 0).to(tl.int32)


@triton.jit
def _read_plans(
    payloads, words, entries, table, age, slots, share,
    layers, ranks, size, sizes_at, key_budget, value_budget, indices_at,
    C: tl.constexpr, FEATURES: tl.constexpr, ROW: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G4: tl.constexpr,
    G8: tl.constexpr, LEVELS: tl.constexpr, BITS_AT: tl.constexpr, SIZE_AT: tl.constexpr, ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr, T: tl.constexpr, SENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one layer and rank: the words of keys, or of values, or which tokens were sent.

    payloads: uint8 [N, l, size]; words: int32 [l, N, 2, C]; entries: int32 [l, N, 2, ROW]; see `mark_sent` for others.
    """
    part, layer_rank = tl.program_id(0), tl.program_id(1)
    layer, rank = layer_rank // ranks, layer_rank % ranks
    if part < 2:
        payload = payloads + (rank * layers + layer).to(tl.int64) * size
        feature = tl.arange(0, FEATURES)
        inside = feature < C
        spread = tl.load(payload + sizes_at + part * C + feature, mask=inside, other=0).to(tl.int32)
        budget = tl.where(part == 0, key_budget, value_budget)
        bits = _bits_of(spread, inside, budget, G1, G2, G4, G8, LEVELS)
        place = _places_of(bits)
        known = (bits << BITS_AT) | (spread << SIZE_AT)
        out = (layer_rank * 2 + part).to(tl.int64)
        tl.store(words + out * C + feature, place | known, mask=inside)
        if ENTRIES:
            lane = tl.arange(0, BLOCK)
            for start in range(0, ROW, BLOCK):
                tl.store(entries + out * ROW + start + lane, -1, mask=start + lane < ROW)
            tl.debug_barrier()
            tl.store(entries + out * ROW + place, feature | known, mask=inside & (bits > 0))
    else:
        mark_sent(
            payloads, table, age, slots, share, layer, rank, ranks, layers, size, indices_at, TOKENS, T, SENT, BLOCK
        )


def read_plans(
    payloads: torch.Tensor,
    gains: list[int],
    sizes_at: int,
    rows: list[int],
    width: int,
    entries: bool,
    table: torch.Tensor | None,
    age: torch.Tensor | None,
    indices_at: int,
    count: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find how payloads are coded, from the sizes of features in them.

    Args:
        payloads: uint8 [N, l, size].
        gains: of upgrades to 1, 2, 4 and 8 bits; see `_bits_of`.
        sizes_at: where in a payload the bytes of features' sizes begin.
        rows: bytes of a key's codes, and of a value's.
        width: C.
        entries: whether entries are wanted: to encode.
        table: the tokens of each sub-block, int64 [K, T]; None to mark nothing.
        age, indices_at, count: as for `otil_xdit.method.kernels.copies.correct_copies`; read where there is a table.
        tokens: S.

    Returns:
        Words, int32 [l, N, 2, C]; entries, int32 [l, N, 2, bits of the longer row]; the places of tokens among those
        sent, int32 [l, N, S], and their shares of a correction, float32 [l, N, S]. What is not wanted has no numbers.
    """
    ranks, layers, size = payloads.shape
    device, marks = payloads.device, table is not None
    words = torch.empty(layers, ranks, 2, width, dtype=torch.int32, device=device)
    longest = 8 * max(rows) if entries else 0
    starts = torch.empty(layers, ranks, 2, longest, dtype=torch.int32, device=device)
    slots = torch.empty(layers, ranks, tokens if marks else 0, dtype=torch.int32, device=device)
    share = torch.empty(layers, ranks, tokens if marks else 0, dtype=torch.float32, device=device)
    ages = torch.ones_like(share) if age is None and marks else share if age is None else age
    side = 1 if table is None else table.shape[1]
    features = triton.next_power_of_2(width)
    _read_plans[(3 if marks else 2, layers * ranks)](
        payloads, words, starts, words if table is None else table, ages, slots, share,
        layers, ranks, size, sizes_at, 8 * rows[0], 8 * rows[1], indices_at,
        C=width, FEATURES=features, ROW=longest, G1=gains[0], G2=gains[1], G4=gains[2], G8=gains[3], LEVELS=_LEVELS,
        BITS_AT=BITS_AT, SIZE_AT=SIZE_AT, ENTRIES=entries, TOKENS=tokens, T=side, SENT=count * side, BLOCK=1024,
        num_warps=8 if features > 2048 else 4,
    )  # fmt: skip
    return words, starts, slots, share
