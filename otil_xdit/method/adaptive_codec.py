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
from typing import Any

import torch

from otil_xdit.method.bit_plan import plan_of, upgrade_gains
from otil_xdit.method.codec import (
    OCTAVE,
    ZERO,
    Codec,
    Decoded,
    cut_off,
    scale_table,
    scales_of,
    scattered_codes,
    write_scales,
)
from otil_xdit.method.scratch import ScratchBuffers


class AdaptiveCodec(Codec):
    """A code of 0, 1, 2, 4 or 8 bits for each number, by its feature; a byte for each feature's size and vector's.

    The bytes are [vectors' scales, keys' features, values' features, keys' codes, values' codes]. They are never more
    than those of 2 bits for each number and a byte for each vector: the features' bytes are taken off the codes, as
    long as half is left.
    """

    of_residuals = True
    by_feature = True
    bits = 2
    kernels = "adaptive:encode_adaptive", "adaptive_copies:advance_adaptive"
    read_kernel = "adaptive_copies:read_adaptive"

    def row_bytes(self, vectors: int, width: int) -> tuple[int, ...]:
        """Return the bytes of the codes of a key and of a value; of any vector where there is an odd number."""
        fixed, parts = -(-width * self.bits // 8), _parts(vectors)
        both = max(parts * fixed - -(-(parts**2) * width // vectors), -(-parts * fixed // 2))
        return tuple((both + part) // parts for part in range(parts))

    def size(self, vectors: int, width: int) -> int:
        return sum(self._sizes(vectors, width))

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        count, width = vectors.shape[-2:]
        parts = vectors.unflatten(-2, (_parts(count), -1))
        self.encode_measured(vectors, sizes_of(parts, (-2,), scratch), out, scratch)

    def encode_measured(
        self, vectors: torch.Tensor, sizes: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers
    ) -> None:
        count, width = vectors.shape[-2:]
        scale_bytes, spectrum, *codes = self._split(out, count, width)
        parts = vectors.unflatten(-2, (_parts(count), -1))
        write_scales(sizes, spectrum)
        plan = plan_of(spectrum, self.row_bytes(count, width), scratch)
        parts.mul_(plan.inverse)
        write_scales(torch.linalg.vector_norm(parts, dim=-1).div_(plan.weight), scale_bytes)
        parts.mul_(scales_of(scale_bytes)[..., None].reciprocal_())
        torch.addcmul(plan.middle, parts, plan.density, out=parts)
        torch.clamp(parts, _zero(parts.device), plan.highest, out=parts)
        found = scratch("codec.codes", tuple(parts.shape), torch.uint8)
        cut_off(parts, found, scratch)
        found.bitwise_left_shift_(plan.shift)
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
        scales, spectrum, *codes = torch.split_with_sizes(coded[..., : sum(sizes)], sizes, dim=-1)
        rows = [part.unflatten(-1, (vectors // parts, -1)) for part in codes]
        return [scales.unflatten(-1, (parts, -1)), spectrum.unflatten(-1, (parts, width)), *rows]

    def _rows(self, codes: list[torch.Tensor], scratch: ScratchBuffers) -> torch.Tensor:
        """Return room for all codes, uint8 [..., 2, v, R], in scratch, R being the longer row's in whole words."""
        *leading, count, row = codes[-1].shape
        return scratch("codec.rows", (*leading, len(codes), count, -(-row // 8) * 8), torch.uint8)

    def _filled(self, codes: list[torch.Tensor], scratch: ScratchBuffers) -> torch.Tensor:
        """Return codes, uint8 [..., v, R] twice, as [..., 2, v, R] of `_rows`; the end of a row is undefined."""
        rows = self._rows(codes, scratch)
        for part, given in enumerate(codes):
            rows[..., part, :, : given.shape[-1]].copy_(given)
        return rows

    def _levels(
        self, codes: torch.Tensor, spectrum: torch.Tensor, rows: tuple[int, ...], scratch: ScratchBuffers
    ) -> torch.Tensor:
        """Return the numbers of codes, uint8 [..., 2, v, R], at their vectors' scale 1; float32 [..., V, C]."""
        plan = plan_of(spectrum, rows, scratch)
        shape = (*codes.shape[:-1], spectrum.shape[-1])
        found = scratch("codec.found", shape, torch.uint8)
        torch.gather(codes, -1, plan.byte.expand(shape), out=found)
        found.bitwise_right_shift_(plan.shift).bitwise_and_(plan.mask)
        numbers = scratch("codec.levels", shape, torch.float32).copy_(found)
        return torch.addcmul(plan.lowest, numbers, plan.sizes, out=numbers).flatten(-3, -2)


def sizes_of(numbers: torch.Tensor, over: tuple[int, ...], scratch: ScratchBuffers) -> torch.Tensor:
    """Return the root mean square of numbers over some dimensions, none of them the last; float32."""
    # Over a dimension that is not the last one `vector_norm` adds number by number, and `sum` row by row.
    squares = torch.mul(numbers, numbers, out=scratch("codec.squares", tuple(numbers.shape), torch.float32))
    count = math.prod(numbers.shape[at] for at in over)
    return squares.sum(dim=over).div_(count).sqrt_()


def _parts(vectors: int) -> int:
    """Return how many parts of so many vectors have features' sizes of their own: keys and values."""
    return 2 if vectors % 2 == 0 else 1


@cache
def _zero(device: torch.device) -> torch.Tensor:
    return torch.zeros((), device=device)
