"""Payloads: what keys and values become on the wire. Tensors in, bytes out.

A codec turns vectors into bytes and back; every rank that decodes the same bytes gets the same numbers, bit for bit,
because decoding is table look-ups and one product per number.

Shapes: V vectors (one for each token, key or value, and image), C numbers of a vector, R bytes of its codes; ``...``
layers and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import torch

from otil_xdit.method.scratch import ScratchBuffers

_OCTAVE = 6
"""Steps of a scale's byte to a factor of two: a scale is off by at most 2**(1/12), 6%."""

_ZERO = 128
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

_ENTRIES = {1: torch.complex128, 2: torch.complex128, 4: torch.complex64, 8: torch.float32}
"""By bits: the dtype that is as wide as the float32 numbers of one byte (half as wide with 1 bit). One look-up of such
a number is several times faster on the CPU than one of a row of a table."""


class Codec(ABC):
    """One way to write vectors; a new one is a subclass and an entry in `CODECS`.

    Attributes:
        bits: for each number, scales not counted.
        of_residuals: whether it is given residuals, fresh - prediction, or the fresh values themselves.
    """

    bits: int
    of_residuals: bool

    @abstractmethod
    def size(self, vectors: int, width: int) -> int:
        """Bytes of `vectors` vectors of `width` numbers."""

    @abstractmethod
    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        """Write vectors, float [..., V, C] contiguous, to `out`, uint8 [..., size]; may spoil the vectors."""


class Raw(Codec):
    """The values as they are, in their own type."""

    of_residuals = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bits = 8 * dtype.itemsize

    def size(self, vectors: int, width: int) -> int:
        return vectors * width * self.dtype.itemsize

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        self.values(out, *vectors.shape[-2:]).copy_(vectors)

    def values(self, coded: torch.Tensor, vectors: int, width: int) -> torch.Tensor:
        """The vectors in uint8 [..., size], a view of it: [..., V, C]."""
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

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._per_byte = 8 // bits

    def row_bytes(self, width: int) -> int:
        """R."""
        return -(-width // self._per_byte)

    def size(self, vectors: int, width: int) -> int:
        return vectors * (1 + self.row_bytes(width))

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        width = vectors.shape[-1]
        scale_bytes, codes = self.split(out, vectors.shape[-2], width)
        spread = torch.linalg.vector_norm(vectors, 2 if self.bits < 8 else float("inf"), dim=-1)
        if self.bits < 8:
            spread /= width**0.5
        steps = spread.log2_().mul_(_OCTAVE)
        # The largest number must not be cut off; a root mean square may be rounded either way. log2(0) is -inf.
        steps = steps.ceil_() if self.bits == 8 else steps.round_()
        scale_bytes.copy_(steps.clamp_(-_ZERO, 255 - _ZERO).add_(_ZERO))
        per_byte, row = self._per_byte, codes.shape[-1]
        wide = scratch("codec.codes", (*vectors.shape[:-1], row * per_byte), torch.uint8)
        wide[..., width:].zero_()
        self._quantise(vectors, self.scales(scale_bytes)[..., None], wide[..., :width], scratch)
        self._pack(wide, codes, scratch)

    def split(self, coded: torch.Tensor, vectors: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, uint8 [..., V], and codes, uint8 [..., V, R], of uint8 [..., size]; views of it."""
        row = self.row_bytes(width)
        return coded[..., :vectors], coded[..., vectors : vectors * (1 + row)].unflatten(-1, (vectors, row))

    def scales(self, scale_bytes: torch.Tensor) -> torch.Tensor:
        """What bytes of scales, uint8 of any shape, stand for; float32."""
        return _scales(scale_bytes.device)[scale_bytes.int()]

    def levels(self, codes: torch.Tensor, width: int, scratch: ScratchBuffers) -> torch.Tensor:
        """The numbers at scale 1 that codes, uint8 [..., R], stand for; float32 [..., C], in a room."""
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
        # The conversion to whole numbers cuts off. 8 bits have a code for 0, the others a border there.
        highest = 2**self.bits - (2 if self.bits == 8 else 1)
        middle = 127.5 if self.bits == 8 else 2 ** (self.bits - 1)
        codes.copy_(vectors.mul_((scales * step).reciprocal_()).add_(middle).clamp_(0, highest + 0.5))

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


_QUANTISED = {"int8": 8, "int4": 4, "2bit": 2, "1bit": 1}

CODECS = ("raw", *_QUANTISED)
"""The names that `OtilConfig.codec` takes."""


def make_codec(name: str, dtype: torch.dtype) -> Raw | Quantised:
    """The codec of that name, one of `CODECS`; `dtype` is that of the values."""
    return Quantised(_QUANTISED[name]) if name in _QUANTISED else Raw(dtype)


@cache
def _scales(device: torch.device) -> torch.Tensor:
    """What each byte of a scale stands for; float32 [256]."""
    return torch.exp2((torch.arange(256, dtype=torch.float64) - _ZERO) / _OCTAVE).float().to(device)


def _levels(bits: int) -> torch.Tensor:
    """What each code stands for, at scale 1, in rising order; float32 [2**bits], the last of 8 bits unused."""
    if bits == 8:
        return torch.cat([torch.arange(-127, 128) / 127, torch.zeros(1)])
    positive = torch.tensor(_GAUSSIAN[bits])
    return torch.cat([-positive.flip(0), positive])


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """The numbers that each byte of codes stands for, as `_ENTRIES`: [256], or [256, 2] with 1 bit."""
    lanes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
    numbers = _levels(bits)[lanes & (2**bits - 1)]
    return numbers.view(_ENTRIES[bits]).squeeze(-1).to(device)


@cache
def _borders(bits: int, device: torch.device) -> torch.Tensor:
    """Where one code ends and the next begins: halfway between their levels."""
    levels = _levels(bits)
    return ((levels[1:] + levels[:-1]) / 2).to(device)
