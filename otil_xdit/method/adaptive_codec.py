"""The adaptive codec: 2 bits a number on average, more of them for features that vary more.

A sender measures how much each feature of its residuals varies, sends that along in a byte for each, and shares out
its bits by it: what leaves the least squared error (reverse water-filling, T. Berger, "Rate Distortion Theory", 1971).
In coordinates (`otil_xdit.method.coordinates`) few features carry most of what changes.

Shapes: V vectors, the first half of them keys and the second values; v = V / 2; C features, R bytes of a vector's
codes; ``...`` layers and ranks. An odd number of vectors is one part, of which 1 stands for every 2 here.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch

from otil_xdit.method.codec import (
    OCTAVE,
    ZERO,
    Codec,
    Decoded,
    scale_table,
    scales_of,
    scattered_codes,
    write_scales,
)
from otil_xdit.method.scratch import ScratchBuffers

_STEPS = {0: 0.0, 1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""By bits: the distance of the evenly spaced levels with the least squared error for a normal distribution (J. Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table II)."""

_UPGRADES = ((0, 1, 0.6366), (1, 2, 0.2459), (2, 4, 0.0540), (4, 8, 0.00235))
"""From how many bits to how many, and the share of the variance that each of the added bits takes off the error."""

_CLASSES = (8, 4, 2, 1)
"""Bits of a feature, in the order in which codes lie in a row: none then crosses the border of a byte."""


class _Plan(NamedTuple):
    """How the numbers of a vector are written; each [..., 2, 1, C].

    Attributes:
        inverse: float32, one over each feature's root mean square; 0 for a feature that has no bits.
        steps: float32, the distance of its levels at scale 1.
        middle: float32, the code between the lower half of the levels and the upper one: 2**bits / 2; 0 without bits.
        highest: uint8, its highest code, 2**bits - 1.
        byte: int64, the byte of a row that holds its code.
        shift: uint8, the place of the code's lowest bit there.
        weight: float32 [..., 2, 1], the number of features that have bits.
    """

    inverse: torch.Tensor
    steps: torch.Tensor
    middle: torch.Tensor
    highest: torch.Tensor
    byte: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor


class AdaptiveCodec(Codec):
    """A code of 0, 1, 2, 4 or 8 bits for each number, by its feature; a byte for each feature's size and vector's.

    The bytes are [vectors' scales, keys' features, values' features, keys' codes, values' codes]. They are never more
    than those of 2 bits for each number and a byte for each vector: the features' bytes are taken off the codes, as
    long as half is left.
    """

    of_residuals = True
    by_feature = True
    bits = 2
    kernels = "adaptive:encode_adaptive", "adaptive_copies:correct_adaptive"
    late_kernels = "adaptive_copies:read_adaptive", "adaptive_copies:advance_adaptive"
    writes_corrected = True

    def row_bytes(self, vectors: int, width: int) -> tuple[int, ...]:
        """Return the bytes of the codes of a key and of a value; of any vector where there is an odd number."""
        fixed, parts = -(-width * self.bits // 8), _parts(vectors)
        both = max(parts * fixed - -(-(parts**2) * width // vectors), -(-parts * fixed // 2))
        return tuple((both + part) // parts for part in range(parts))

    def size(self, vectors: int, width: int) -> int:
        return sum(self._sizes(vectors, width))

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        count, width = vectors.shape[-2:]
        scale_bytes, spectrum, *codes = self._split(out, count, width)
        parts = vectors.unflatten(-2, (_parts(count), -1))
        write_scales(torch.linalg.vector_norm(parts, dim=-2).div_(parts.shape[-2] ** 0.5), spectrum)
        plan = _plan_of(spectrum, self.row_bytes(count, width), scratch)
        parts.mul_(plan.inverse)
        write_scales(torch.linalg.vector_norm(parts, dim=-1).div_(plan.weight), scale_bytes)
        parts.mul_(scales_of(scale_bytes)[..., None].reciprocal_()).div_(plan.steps.clamp_min(1e-9)).add_(plan.middle)
        found = scratch("codec.codes", tuple(parts.shape), torch.uint8)
        # The conversion to whole numbers cuts off.
        found.copy_(torch.minimum(parts.clamp_min_(0), plan.highest, out=parts)).bitwise_left_shift_(plan.shift)
        rows = self._rows(codes, scratch).zero_().scatter_add_(-1, plan.byte.expand(parts.shape), found)
        for part, written in enumerate(codes):
            written.copy_(rows[..., part, :, : written.shape[-1]])

    def decode(self, coded: torch.Tensor, vectors: int, width: int, scratch: ScratchBuffers) -> Decoded:
        scale_bytes, spectrum, *codes = self._split(coded, vectors, width)
        rows = self._filled(codes, scratch)
        levels = self._levels(rows, spectrum, self.row_bytes(vectors, width), scratch)
        return levels, scales_of(scale_bytes).flatten(-2)[..., None]

    def decode_at(
        self, coded: torch.Tensor, vectors: int, width: int, rows: torch.Tensor, total: int, scratch: ScratchBuffers
    ) -> Decoded:
        scale_bytes, spectrum, *codes = self._split(coded, vectors, width)
        everywhere = scattered_codes(self._filled(codes, scratch).flatten(-3, -2), rows, total, scratch)
        everywhere = everywhere.unflatten(-2, (len(codes), -1))
        scales = scratch("scales", (*coded.shape[:-1], total), torch.float32)
        scales.zero_().view(-1).index_copy_(0, rows, scales_of(scale_bytes).reshape(-1))
        return self._levels(everywhere, spectrum, self.row_bytes(vectors, width), scratch), scales[..., None]

    def kernel_arguments(self, device: torch.device, vectors: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
        gains, rows = upgrade_gains(), list(self.row_bytes(vectors, width))
        decoding = {"scales": scale_table(device), "upgrades": gains, "rows": rows}
        return {**decoding, "octave": float(OCTAVE), "zero": float(ZERO)}, decoding

    def _sizes(self, vectors: int, width: int) -> tuple[int, ...]:
        """Return the bytes of scales, of features' sizes, and of each part's codes."""
        parts = _parts(vectors)
        return vectors, parts * width, *(vectors // parts * row for row in self.row_bytes(vectors, width))

    def _split(self, coded: torch.Tensor, vectors: int, width: int) -> list[torch.Tensor]:
        """View uint8 [..., size] as scales, [..., 2, v], features' bytes, [..., 2, C], and codes, [..., v, R] twice."""
        sizes, parts = self._sizes(vectors, width), _parts(vectors)
        scales, spectrum, *codes = coded[..., : sum(sizes)].split(sizes, dim=-1)
        rows = [part.unflatten(-1, (vectors // parts, -1)) for part in codes]
        return [scales.unflatten(-1, (parts, -1)), spectrum.unflatten(-1, (parts, width)), *rows]

    def _rows(self, codes: list[torch.Tensor], scratch: ScratchBuffers) -> torch.Tensor:
        """Return room for all codes, uint8 [..., 2, v, R], R being the longer row's, in scratch."""
        *leading, count, row = codes[-1].shape
        return scratch("codec.rows", (*leading, len(codes), count, row), torch.uint8)

    def _filled(self, codes: list[torch.Tensor], scratch: ScratchBuffers) -> torch.Tensor:
        """Return codes, uint8 [..., v, R] twice, as [..., 2, v, R]; the end of a shorter row is undefined."""
        rows = self._rows(codes, scratch)
        for part, given in enumerate(codes):
            rows[..., part, :, : given.shape[-1]].copy_(given)
        return rows

    def _levels(
        self, codes: torch.Tensor, spectrum: torch.Tensor, rows: tuple[int, ...], scratch: ScratchBuffers
    ) -> torch.Tensor:
        """Return the numbers of codes, uint8 [..., 2, v, R], at their vectors' scale 1; float32 [..., V, C]."""
        plan = _plan_of(spectrum, rows, scratch)
        shape = (*codes.shape[:-1], spectrum.shape[-1])
        found = scratch("codec.found", shape, torch.uint8)
        torch.gather(codes, -1, plan.byte.expand(shape), out=found)
        found.bitwise_right_shift_(plan.shift).bitwise_and_(plan.highest)
        sizes = plan.steps * scales_of(spectrum)[..., None, :]
        numbers = scratch("codec.levels", shape, torch.float32).copy_(found)
        return numbers.mul_(sizes).sub_(sizes.mul_(plan.highest).mul_(0.5)).flatten(-3, -2)


def _parts(vectors: int) -> int:
    """Return how many parts of so many vectors have features' sizes of their own: keys and values."""
    return 2 if vectors % 2 == 0 else 1


def _plan_of(spectrum: torch.Tensor, rows: tuple[int, ...], scratch: ScratchBuffers) -> _Plan:
    """Share out the bits of `rows`, the bytes of a key's and of a value's codes, by features' sizes, uint8 [..., 2, C].

    Whole numbers throughout, so that everybody finds the same.
    """
    bits = _bits_of(spectrum, _budgets(spectrum.device, rows), scratch)
    byte, shift = _places_of(bits, scratch)
    steps, middle, highest = (table[bits][..., None, :] for table in _tables(spectrum.device))
    has_bits = bits > 0
    inverse = scales_of(spectrum).reciprocal_().mul_(has_bits)[..., None, :]
    weight = has_bits.sum(dim=-1, keepdim=True).clamp_min_(1).sqrt()
    return _Plan(inverse, steps, middle, highest, byte[..., None, :], shift[..., None, :], weight)


def _bits_of(spectrum: torch.Tensor, budgets: torch.Tensor, scratch: ScratchBuffers) -> torch.Tensor:
    """Return the bits of each feature, int32 [..., 2, C], by features' sizes, uint8 of that shape.

    Upgrades are bought by what they gain, as long as all are within the budgets, int32 [2, 1].
    """
    costs, gains, order = _prices(spectrum.device, spectrum.shape[-1])
    shape = (*spectrum.shape[:-1], order.numel())
    worth = scratch("codec.worth", (*spectrum.shape, len(gains)), torch.int32)
    # No two are equal: of equal gains the feature with the lower index is first.
    torch.add(spectrum[..., None], gains, out=worth)
    worth.mul_(order.numel()).add_(order.view(-1, len(gains)))
    ranked = scratch("codec.ranked", shape, torch.int32)
    best = scratch("codec.best", shape, torch.int64)
    torch.sort(worth.view(shape), dim=-1, descending=True, out=(ranked, best))
    bought = scratch("codec.bought", shape, torch.int32)
    torch.gather(costs.expand(shape), -1, best, out=bought)
    torch.cumsum(bought, dim=-1, dtype=torch.int32, out=ranked)
    bought.mul_(ranked <= budgets)
    worth.view(shape).scatter_(-1, best, bought)
    return worth.sum(dim=-1, dtype=torch.int32)


def _places_of(bits: torch.Tensor, scratch: ScratchBuffers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the byte, int64, and the lowest bit's place in it, uint8, of the codes of `bits`, int32 [..., C]."""
    classes = _classes(bits.device)
    members = bits[..., None] == classes
    places = scratch("codec.worth", tuple(members.shape), torch.int32)
    torch.cumsum(members, dim=-2, dtype=torch.int32, out=places)
    whole = places[..., -1:, :] * classes
    places.sub_(1).mul_(classes).add_(whole.cumsum(dim=-1, dtype=torch.int32).sub_(whole)).mul_(members)
    found = places.sum(dim=-1, dtype=torch.int32)
    return (found >> 3).long(), found.bitwise_and_(7).to(torch.uint8)


@cache
def _budgets(device: torch.device, rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[8 * row] for row in rows], dtype=torch.int32).to(device)


@cache
def _classes(device: torch.device) -> torch.Tensor:
    return torch.tensor(_CLASSES, dtype=torch.int32).to(device)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return steps, middles, float32, and highest codes, uint8, by bits; [9]."""
    steps = [_STEPS.get(bits, 0.0) for bits in range(9)]
    middles = [2.0**bits / 2 if bits else 0.0 for bits in range(9)]
    highest = torch.tensor([2**bits - 1 for bits in range(9)], dtype=torch.uint8)
    return torch.tensor(steps).to(device), torch.tensor(middles).to(device), highest.to(device)


def upgrade_gains() -> list[int]:
    """Return log2 of what a bit of each upgrade gains, in steps of a feature's byte, which is of an amplitude."""
    return [round(OCTAVE / 2 * math.log2(gain)) for *_, gain in _UPGRADES]


@cache
def _prices(device: torch.device, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what upgrades cost and how they are put in order.

    Returns:
        Bits of each upgrade of each feature, int32 [C * 4]; `upgrade_gains`, int32 [4]; and a number for each upgrade
        of each feature that falls with its place, int32 [C * 4].
    """
    costs = torch.tensor([after - before for before, after, _ in _UPGRADES], dtype=torch.int32).repeat(width)
    gains = torch.tensor(upgrade_gains(), dtype=torch.int32)
    order = torch.arange(len(costs) - 1, -1, -1, dtype=torch.int32)
    return costs.to(device), gains.to(device), order.to(device)
