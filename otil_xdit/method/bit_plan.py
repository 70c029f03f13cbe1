"""The bits of each feature of an adaptive payload: in whole numbers throughout, so that everybody finds the same.

`otil_xdit.method.adaptive_codec` writes and reads codes by it; `otil_xdit.method.kernels.bits` has it for GPUs.

An upgrade's *level* is what it gains: a feature's size, on the scale of its byte, less the upgrade's *fall*. Upgrades
are bought from the highest level on. What those of each level cost tells where a budget ends: nothing is sorted.

Shapes: C features of a vector; ``...`` layers, ranks, and keys and values.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from otil_xdit.method.codec import OCTAVE, scale_table
from otil_xdit.method.scratch import ScratchBuffers

_STEPS = {0: 0.0, 1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""By bits: the distance of the evenly spaced levels with the least squared error for a normal distribution (J. Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table II)."""

_UPGRADES = ((0, 1, 0.6366), (1, 2, 0.2459), (2, 4, 0.0540), (4, 8, 0.00235))
"""From how many bits to how many, and the share of the variance that each of the added bits takes off the error."""

_SIZES = 256
"""Values of a byte that says how large a feature is."""

_LANE = 16
"""Bits of a sum of bits, of which four are in a word, so that one running sum does for all: of features that have 8, of
those that have 4, 2 and 1. In that order codes lie in a row: none then crosses the border of a byte."""


class BitPlan(NamedTuple):
    """How the numbers of a vector are written.

    Attributes:
        bits: int64 [..., C], of each feature.
        entry: int64 [..., C], its bits and its size's byte: its place in tables of both.
        byte: int64 [..., 1, C], the byte of a row that holds its code.
        shift: uint8 [..., 1, C], the place of the code's lowest bit there.
    """

    bits: torch.Tensor
    entry: torch.Tensor
    byte: torch.Tensor
    shift: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The root of the number of features that have bits, float32 [..., 1]."""
        return (self.bits > 0).sum(dim=-1, keepdim=True).clamp_min_(1).sqrt()

    @property
    def inverse(self) -> torch.Tensor:
        """One over each feature's root mean square, float32 [..., 1, C]; 0 for a feature that has no bits."""
        return self._of_entry(_tables(self.bits.device).inverses)

    @property
    def sizes(self) -> torch.Tensor:
        """The distance of its levels, float32 [..., 1, C]."""
        return self._of_entry(_tables(self.bits.device).sizes)

    @property
    def lowest(self) -> torch.Tensor:
        """Its lowest level, float32 [..., 1, C]."""
        return self._of_entry(_tables(self.bits.device).lowest)

    @property
    def density(self) -> torch.Tensor:
        """How many of its levels lie in a distance of 1 at scale 1, float32 [..., 1, C]; 0 where there are no bits."""
        return self._of_bits(_tables(self.bits.device).densities)

    @property
    def middle(self) -> torch.Tensor:
        """The code between the lower half of the levels and the upper one, float32 [..., 1, C]; 0 without bits."""
        return self._of_bits(_tables(self.bits.device).middles)

    @property
    def highest(self) -> torch.Tensor:
        """Its highest code, float32 [..., 1, C]."""
        return self._of_bits(_tables(self.bits.device).highest)

    @property
    def mask(self) -> torch.Tensor:
        """Its highest code, uint8 [..., 1, C]."""
        return self._of_bits(_tables(self.bits.device).masks)

    def _of_bits(self, table: torch.Tensor) -> torch.Tensor:
        return torch.take(table, self.bits).unsqueeze(-2)

    def _of_entry(self, table: torch.Tensor) -> torch.Tensor:
        return torch.take(table, self.entry).unsqueeze(-2)


def plan_of(spectrum: torch.Tensor, rows: tuple[int, ...], scratch: ScratchBuffers) -> BitPlan:
    """Share out the bits of `rows`, the bytes of a key's and of a value's codes.

    Args:
        spectrum: features' sizes, uint8 [..., 2, C], or [..., 1, C] with one number of bytes.
        rows: bytes.
        scratch: for intermediate tensors.
    """
    bits = bits_of(spectrum, _budgets(spectrum.device, rows), scratch)
    byte, shift = places_of(bits)
    entry = torch.add(spectrum, bits, alpha=_SIZES)
    return BitPlan(bits, entry, byte.unsqueeze(-2), shift.unsqueeze(-2))


def bits_of(spectrum: torch.Tensor, budgets: torch.Tensor, scratch: ScratchBuffers) -> torch.Tensor:
    """Return the bits of each feature, int64 [..., C], by features' sizes, uint8 of that shape.

    Upgrades are bought by their levels, and on one level in the order of the features, as long as all are within the
    budgets, int64, of a shape that [..., 1] can be broadcast with.
    """
    # What all upgrades of the first levels cost, from the highest possible on: of none, of the highest one, of two, ...
    spent = scratch("codec.spent", (*spectrum.shape[:-1], 1 + _SIZES + upgrade_falls()[-1]), torch.int64).zero_()
    falls, costs = _upgrades_of(spectrum.device, spectrum.shape[-1])
    levels_of = scratch("codec.levels", (*spectrum.shape[:-1], len(falls), spectrum.shape[-1]), torch.int64)
    levels_of = torch.add(spectrum.bitwise_not().unsqueeze(-2), falls, out=levels_of).flatten(-2)
    spent = spent.scatter_add_(-1, levels_of, costs.expand(levels_of.shape)).cumsum_(dim=-1)
    limits = budgets.expand(spectrum.shape[:-1] + (1,)).contiguous()
    levels = torch.searchsorted(spent, limits, right=True).sub_(1)
    left = limits - spent.gather(-1, levels)
    distance = levels + spectrum
    bought, offered = (torch.take(table, distance) for table in _prices(spectrum.device))
    return bought.add_(offered.mul(offered.cumsum(dim=-1) <= left))


def places_of(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the byte, int64, and the lowest bit's place in it, uint8, of the codes of `bits`, int64 [..., C]."""
    assert bits.shape[-1] < 2 ** (_LANE - 2), "a row of 2 bits a feature has fewer bits than a lane counts to"
    words, lanes = _lanes(bits.device)
    ends = torch.take(words, bits).cumsum(dim=-1)
    # In each lane, the sum of the lanes below it in the last word; what leaves the word at its top is not needed.
    starts = ends[..., -1:] * sum(1 << _LANE * lane for lane in (1, 2, 3))
    ends = ends.add_(starts).bitwise_right_shift_(torch.take(lanes, bits)).bitwise_and_((1 << _LANE) - 1).sub_(bits)
    return ends >> 3, ends.bitwise_and_(7).to(torch.uint8)


def upgrade_gains() -> list[int]:
    """Return log2 of what a bit of each upgrade gains, in steps of a feature's byte, which is of an amplitude."""
    return [round(OCTAVE / 2 * math.log2(gain)) for *_, gain in _UPGRADES]


def upgrade_falls() -> list[int]:
    """Return how far below its feature's size each upgrade's level is, rising."""
    return [-gain for gain in upgrade_gains()]


@cache
def _upgrades_of(device: torch.device, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each of the U upgrades how far it falls and one, [U, 1], and what it costs each feature, [U * C].

    Both int64: a level counted from the highest possible, of which none is bought at first.
    """
    costs = torch.tensor([after - before for before, after, _ in _UPGRADES])
    falls = torch.tensor(upgrade_falls()) + 1
    return falls[:, None].to(device), costs.repeat_interleave(features).to(device)


@cache
def _budgets(device: torch.device, rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[8 * row] for row in rows]).to(device)


@cache
def _prices(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a feature's bought upgrades cost, and what the one at the end of the budget does; int64.

    Both by the number of levels that can be bought whole, counted from the highest, and the feature's size added to it.
    """
    falls, costs = upgrade_falls(), [after - before for before, after, _ in _UPGRADES]
    below = torch.arange(2 * _SIZES + falls[-1])[:, None] - (_SIZES - 1)
    each = torch.tensor(costs)
    bought, offered = ((where * each).sum(1) for where in (below > torch.tensor(falls), below == torch.tensor(falls)))
    return bought.to(device), offered.to(device)


@cache
def _lanes(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by bits: a word with them in their lane, and the lane's place; of 0 bits a place where no lane is."""
    lanes = {bits: _LANE * lane for lane, bits in enumerate((8, 4, 2, 1))}
    words = torch.tensor([bits << lanes.get(bits, 0) for bits in range(9)])
    return words.to(device), torch.tensor([lanes.get(bits, 63) for bits in range(9)]).to(device)


class _Tables(NamedTuple):
    """By bits, [9]: densities, middles and highest codes, these also as uint8; by entries, [9 * 256]: the others."""

    densities: torch.Tensor
    middles: torch.Tensor
    highest: torch.Tensor
    masks: torch.Tensor
    inverses: torch.Tensor
    sizes: torch.Tensor
    lowest: torch.Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    steps = torch.tensor([_STEPS.get(bits, 0.0) for bits in range(9)])
    middles = torch.tensor([2.0**bits / 2 if bits else 0.0 for bits in range(9)])
    highest = torch.tensor([2.0**bits - 1 for bits in range(9)])
    scales = scale_table(torch.device("cpu"))
    inverses = scales.reciprocal() * (torch.arange(9) > 0)[:, None]
    sizes = steps[:, None] * scales
    lowest = sizes * highest[:, None] * -0.5
    by_entry = [table.flatten() for table in (inverses, sizes, lowest)]
    by_bits = [steps.reciprocal().where(steps > 0, 0.0), middles, highest, highest.to(torch.uint8)]
    return _Tables(*(table.to(device) for table in (*by_bits, *by_entry)))
