"""Codecs: write keys and values as bytes, and read them back.

A codec turns vectors into bytes and back; every rank that decodes the same bytes gets the same numbers, bit for bit,
because decoding is table look-ups and one product per number.

Over 300 lines, of which kernels (`otil_xdit.method.kernels`) need what stands in `kernel_arguments`.

Shapes: V vectors (one for each token, key or value, and image), C numbers of a vector, R bytes of its codes; ``...``
layers and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch

from otil_xdit.method.scratch import ScratchBuffers

OCTAVE = 6
"""Steps of a scale's byte to a factor of two: a scale is off by at most 2**(1/12), 6%."""

ZERO = 128
"""The byte of the scale 1; scales reach from 2**-21 to 2**21."""

_GAUSSIAN = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""Positive levels of the quantisers with the least squared error for a normal distribution, by bits (J. Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table I)."""

_STEPS = {1: 1.0, 2: (_GAUSSIAN[2][0] + _GAUSSIAN[2][1]) / 2, 8: 1 / 127}
"""Where the borders between codes are evenly spaced: how far apart, at scale 1. One bit has one border, at 0."""

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""By bits: the integer that holds as many codes of a byte each as one byte is to hold."""

_UNITS = torch.int64, torch.int32, torch.uint8
"""What rows of bytes are moved as: fewer, wider elements where they can be."""

_ENTRIES = {1: torch.complex128, 2: torch.complex128, 4: torch.complex64, 8: torch.float32}
"""By bits: the dtype that is as wide as the float32 numbers of one byte (half as wide with 1 bit). One look-up of such
a number is several times faster on the CPU than one of a row of a table."""


Decoded = tuple[torch.Tensor, torch.Tensor | None]
"""Numbers, [..., V, C], and scales, float32 [..., V, 1], whose product is the vectors; without scales the numbers are.
Separate, because a product and a sum in one pass cost less than the product alone and the sum after it."""


class Codec(ABC):
    """One way to write vectors; a new one is a subclass and an entry in `otil_xdit.method.codecs.CODECS`.

    Attributes:
        bits: for each number, scales not counted.
        of_residuals: True to be given residuals, fresh - prediction; False for the fresh values themselves.
        lossless: True where the decoded vectors equal the encoded ones.
        by_feature: True where features of a layer may vary by very different amounts: what coordinates make of them.
        kernels: the operators of CUDA that write payloads and correct copies by them, ``module:name`` below
            `otil_xdit.method.kernels`; None where there are none.
        read_kernel: the operator that finds how payloads are coded, for the second of `kernels` to correct copies when
            it is wanted, of all ranks or of some, and to write them where attention reads them; None where that reads
            payloads itself and corrects all copies at once.
        set_kernel: the operator of CUDA that replaces copies by what changes coded by `kernels` make of them, likewise.
    """

    bits: int
    of_residuals: bool
    lossless: bool = False
    by_feature: bool = False
    kernels: tuple[str, str] | None = None
    read_kernel: str | None = None
    set_kernel: str | None = None

    def kernel_arguments(self, device: torch.device, vectors: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what those operators need of the codec, for `vectors` vectors of `width` numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no kernels")

    @abstractmethod
    def size(self, vectors: int, width: int) -> int:
        """Return the bytes of `vectors` vectors of `width` numbers."""

    @abstractmethod
    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        """Write vectors, float [..., V, C] contiguous, to `out`, uint8 [..., size]; may overwrite the vectors."""

    def encode_measured(
        self, vectors: torch.Tensor, sizes: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers
    ) -> None:
        """Do what `encode` does with vectors that are some of more, whose features were measured together.

        Args:
            vectors, out, scratch: as in `encode`.
            sizes: each feature's root mean square, float32 [..., 2, C], of keys and of values; may be overwritten.
                Read where `by_feature`.
        """
        self.encode(vectors, out, scratch)

    @abstractmethod
    def decode(self, coded: torch.Tensor, vectors: int, width: int, scratch: ScratchBuffers) -> Decoded:
        """Read `vectors` vectors of `width` numbers from `coded`, uint8 [..., size]; float32 where of residuals."""

    def decode_at(
        self, coded: torch.Tensor, vectors: int, width: int, rows: torch.Tensor, total: int, scratch: ScratchBuffers
    ) -> Decoded:
        """Read vectors to some of `total` rows; the others become 0.

        Args:
            coded, vectors, width: as in `decode`.
            rows: int64 [... * V], the row of each vector among all ``... * total``; one that is named twice gets equal
                vectors.
            total: rows.

        Returns:
            [..., total, C], and scales [..., total, 1] or None.
        """
        numbers, scales = self.decode(coded, vectors, width, scratch)
        values = numbers if scales is None else numbers * scales
        everywhere = scratch("codec.scattered", (*coded.shape[:-1], total, width), values.dtype)
        everywhere.zero_().view(-1, width).index_copy_(0, rows, values.reshape(-1, width))
        return everywhere, None


class Raw(Codec):
    """The values as they are, in their own type."""

    of_residuals = False
    lossless = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bits = 8 * dtype.itemsize

    def size(self, vectors: int, width: int) -> int:
        return vectors * width * self.dtype.itemsize

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        self._values(out, *vectors.shape[-2:]).copy_(vectors)

    def decode(self, coded: torch.Tensor, vectors: int, width: int, scratch: ScratchBuffers) -> Decoded:
        return self._values(coded, vectors, width), None

    def _values(self, coded: torch.Tensor, vectors: int, width: int) -> torch.Tensor:
        """View uint8 [..., size] as the vectors in it, [..., V, C]."""
        return coded.view(self.dtype).unflatten(-1, (vectors, width))


class Quantised(Codec):
    """A code of few bits for each number and a byte for each vector's scale.

    The bytes are [scales, codes]; the codes of a vector begin with a byte of their own, the first one in its lowest
    bits.

    Args:
        bits: 1, 2, 4 or 8. Up to 4 the levels are those for a normal distribution and the scale is the root mean
            square; with 8 they are 255 equal steps up to the largest number.
    """

    of_residuals = True
    kernels = "payloads:encode_residuals", "copies:correct_copies"
    set_kernel = "gathered:set_coded"

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._per_byte = 8 // bits

    def row_bytes(self, width: int) -> int:
        """Return R, the bytes of one vector's codes."""
        return -(-width // self._per_byte)

    def size(self, vectors: int, width: int) -> int:
        return vectors * (1 + self.row_bytes(width))

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        width = vectors.shape[-1]
        scale_bytes, codes = self.split(out, vectors.shape[-2], width)
        if self.bits == 8:  # a norm for infinity takes ten times as long
            sizes = scratch("codec.sizes", tuple(vectors.shape), torch.float32)
            spread = torch.abs(vectors, out=sizes).amax(dim=-1)
        else:
            spread = torch.linalg.vector_norm(vectors, dim=-1).div_(width**0.5)
        # The largest number must not be cut off; a root mean square may be rounded either way.
        write_scales(spread, scale_bytes, upwards=self.bits == 8)
        per_byte, row = self._per_byte, codes.shape[-1]
        wide = scratch("codec.codes", (*vectors.shape[:-1], row * per_byte), torch.uint8)
        wide[..., width:].zero_()
        self._quantise(vectors, scales_of(scale_bytes)[..., None], wide[..., :width], scratch)
        self._pack(wide, codes, scratch)

    def decode(self, coded: torch.Tensor, vectors: int, width: int, scratch: ScratchBuffers) -> Decoded:
        scale_bytes, codes = self.split(coded, vectors, width)
        return self.levels(codes, width, scratch), scales_of(scale_bytes)[..., None]

    def decode_at(
        self, coded: torch.Tensor, vectors: int, width: int, rows: torch.Tensor, total: int, scratch: ScratchBuffers
    ) -> Decoded:
        scale_bytes, codes = self.split(coded, vectors, width)
        codes = scattered_codes(codes, rows, total, scratch)
        scales = scratch("scales", (*coded.shape[:-1], total), torch.float32)
        scales.zero_().view(-1).index_copy_(0, rows, scales_of(scale_bytes).reshape(-1))
        return self.levels(codes, width, scratch), scales[..., None]

    def split(self, coded: torch.Tensor, vectors: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View uint8 [..., size] as its scales, uint8 [..., V], and its codes, uint8 [..., V, R]."""
        row = self.row_bytes(width)
        return coded[..., :vectors], coded[..., vectors : vectors * (1 + row)].unflatten(-1, (vectors, row))

    def kernel_arguments(self, device: torch.device, vectors: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
        step, middle, highest = self._spacing
        encoding = {
            "scales": scale_table(device),
            "borders": _borders(4, device),
            "bits": self.bits,
            "octave": float(OCTAVE),
            "zero": float(ZERO),
            "step": step,
            "middle": middle,
            "highest": highest + 0.5,
        }
        return encoding, {"levels": _level_table(self.bits, device), "scales": scale_table(device)}

    @property
    def _spacing(self) -> tuple[float, float, float]:
        """Return the borders' distance at scale 1, the place of 0 among codes, and the highest code.

        8 bits have a code for 0, the others a border there. Of 4 bits, whose borders are not evenly spaced, nothing is
        read.
        """
        is_byte = self.bits == 8
        return (
            _STEPS.get(self.bits, 1.0),
            127.5 if is_byte else 2 ** (self.bits - 1),
            2**self.bits - (2 if is_byte else 1),
        )

    def levels(self, codes: torch.Tensor, width: int, scratch: ScratchBuffers) -> torch.Tensor:
        """Return the numbers that codes, uint8 [..., R], stand for at scale 1; float32 [..., C], in scratch."""
        if self.bits == 8:  # what the table says, by arithmetic that a CPU does many numbers at a time
            return scratch("codec.levels", tuple(codes.shape), torch.float32).copy_(codes).sub_(127).div_(127)
        table = _table(self.bits, codes.device)
        index = scratch("codec.index", tuple(codes.shape), torch.int32).copy_(codes).view(-1)
        numbers = scratch("codec.levels", (*codes.shape[:-1], codes.shape[-1] * self._per_byte), torch.float32)
        entries = numbers.view(-1).view(table.dtype).view(-1, *table.shape[1:])
        torch.index_select(table, 0, index, out=entries)
        return numbers[..., :width]

    def _quantise(
        self, vectors: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, scratch: ScratchBuffers
    ) -> None:
        """Write the codes of vectors, float32 [..., V, C], whose scales are [..., V, 1], to uint8 [..., V, C]."""
        step = _STEPS.get(self.bits)
        if step is None:
            found = scratch("codec.index", tuple(vectors.shape), torch.int32)
            borders = _borders(self.bits, vectors.device)
            codes.copy_(torch.bucketize(vectors.div_(scales), borders, out_int32=True, out=found))
            return
        _, middle, highest = self._spacing
        cut_off(vectors.mul_((scales * step).reciprocal_()).add_(middle).clamp_(0, highest + 0.5), codes, scratch)

    def _pack(self, codes: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        """Write codes, uint8 [..., R * 8 / bits] below 2**bits, to the bytes of `out`, [..., R]; spoils the codes."""
        if self.bits == 8:
            out.copy_(codes)
            return
        # Codes in neighbouring bytes of a word move together: two of them, then two pairs, ... Little-endian.
        words = codes.view(_WORDS[self.bits])
        shifted = scratch("codec.shifted", tuple(words.shape), words.dtype)
        joined = 1
        while joined < self._per_byte:
            torch.bitwise_right_shift(words, joined * (8 - self.bits), out=shifted)
            words.bitwise_or_(shifted)
            joined *= 2
        out.copy_(words.bitwise_and_(255))


def write_scales(scales: torch.Tensor, out: torch.Tensor, upwards: bool = False) -> None:
    """Write scales, float32 of any shape, as bytes to `out`, uint8 of the same shape; spoils the scales.

    Args:
        upwards: round up, not to the nearest.
    """
    steps = scales.log2_().mul_(OCTAVE)  # log2(0) is -inf
    steps = steps.ceil_() if upwards else steps.round_()
    out.copy_(steps.clamp_(-ZERO, 255 - ZERO).add_(ZERO))


def scales_of(scale_bytes: torch.Tensor) -> torch.Tensor:
    """Return the scales that bytes, uint8 of any shape, stand for; float32."""
    places = scale_bytes.int()
    return torch.index_select(scale_table(places.device), 0, places.reshape(-1)).view(places.shape)


def cut_off(values: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
    """Write the whole parts of values in [0, 256) to `out`, uint8 of their shape.

    A CPU converts to 16 bits, and these to 8, several times as fast as at once; a dry run counts what that takes.
    """
    if values.device.type != "cuda":
        values = scratch("codec.whole", tuple(values.shape), torch.int16).copy_(values)
    out.copy_(values)


def scattered_codes(codes: torch.Tensor, rows: torch.Tensor, total: int, scratch: ScratchBuffers) -> torch.Tensor:
    """Copy codes, uint8 [..., V, R], to their rows of [..., total, R], in scratch; 0 elsewhere.

    Bytes are moved, because they are a small part of the numbers that they stand for.
    """
    row = codes.shape[-1]
    unit = next(kind for kind in _UNITS if row % kind.itemsize == 0)
    if not codes.is_contiguous() or codes.storage_offset() % unit.itemsize:
        codes = scratch("packed", tuple(codes.shape), torch.uint8).copy_(codes)
    everywhere = scratch("scattered", (*codes.shape[:-2], total, row), torch.uint8)
    everywhere.zero_().view(-1, row).view(unit).index_copy_(0, rows, codes.view(-1, row).view(unit))
    return everywhere


@cache
def scale_table(device: torch.device) -> torch.Tensor:
    """Return the scale of each byte; float32 [256]."""
    return torch.exp2((torch.arange(256, dtype=torch.float64) - ZERO) / OCTAVE).float().to(device)


def _levels(bits: int) -> torch.Tensor:
    """Return the number of each code at scale 1, in rising order; float32 [2**bits], the last of 8 bits unused."""
    if bits == 8:
        return torch.cat([torch.arange(-127, 128) / 127, torch.zeros(1)])
    positive = torch.tensor(_GAUSSIAN[bits])
    return torch.cat([-positive.flip(0), positive])


@cache
def _level_table(bits: int, device: torch.device) -> torch.Tensor:
    return _levels(bits).to(device)


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """Return the numbers of each byte of codes, as `_ENTRIES`: [256], or [256, 2] with 1 bit."""
    lanes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
    numbers = _levels(bits)[lanes & (2**bits - 1)]
    return numbers.view(_ENTRIES[bits]).squeeze(-1).to(device)


@cache
def _borders(bits: int, device: torch.device) -> torch.Tensor:
    """Return where one code ends and the next begins: halfway between their levels; float32 [2**bits - 1]."""
    levels = _levels(bits)
    return ((levels[1:] + levels[:-1]) / 2).to(device)
