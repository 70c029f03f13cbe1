"""Payloads: what keys and values become on the wire. Tensors in, bytes out.

A codec turns vectors into bytes and back; every rank that decodes the same bytes gets the same numbers, bit for bit,
because decoding is table look-ups and one product per number.

Shapes: V vectors (one for each token, key or value, and image), C numbers of a vector; ``...`` the ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import torch

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


class Codec(ABC):
    """One way to write vectors; a new one is a subclass and an entry in `CODECS`.

    Attributes:
        bits: for each number, scales not counted.
        of_residuals: whether it is given residuals, fresh - prediction, or the fresh values themselves.
    """

    bits: int
    of_residuals = True

    @abstractmethod
    def size(self, vectors: int, width: int) -> int:
        """Bytes of `vectors` vectors of `width` numbers."""

    @abstractmethod
    def encode(self, vectors: torch.Tensor, out: torch.Tensor) -> None:
        """Write vectors, float [V, C], to `out`, uint8 [size]."""

    @abstractmethod
    def decode(self, payload: torch.Tensor, vectors: int, width: int) -> torch.Tensor:
        """The vectors in `payload`, uint8 [..., size]: [..., V, C]."""


class Raw(Codec):
    """The values as they are, in their own type."""

    of_residuals = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bits = 8 * dtype.itemsize

    def size(self, vectors: int, width: int) -> int:
        return vectors * width * self.dtype.itemsize

    def encode(self, vectors: torch.Tensor, out: torch.Tensor) -> None:
        out.view(self.dtype).view(vectors.shape).copy_(vectors)

    def decode(self, payload: torch.Tensor, vectors: int, width: int) -> torch.Tensor:
        return payload.view(self.dtype).unflatten(-1, (vectors, width))


class Quantised(Codec):
    """A code of few bits for each number and a byte for each vector's scale; float32 when decoded.

    The bytes are [scales, codes]; codes follow each other without gaps, the last byte is filled up with zeros.

    Args:
        bits: 1, 2, 4 or 8. Up to 4 the levels are those for a normal distribution and the scale is the root mean
            square; with 8 they are 255 equal steps up to the largest number.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def size(self, vectors: int, width: int) -> int:
        return vectors + -(-vectors * width * self.bits // 8)

    def encode(self, vectors: torch.Tensor, out: torch.Tensor) -> None:
        vectors = vectors.float()
        count = vectors.shape[0]
        spread = vectors.abs().amax(-1) if self.bits == 8 else vectors.square().mean(-1).sqrt()
        steps = _OCTAVE * torch.log2(spread)
        # The largest number must not be cut off; a root mean square may be rounded either way. log2(0) is -inf.
        steps = (steps.ceil() if self.bits == 8 else steps.round()).clamp(-_ZERO, 255 - _ZERO)
        out[:count] = (steps + _ZERO).to(torch.uint8)
        scaled = vectors / _scales(vectors.device)[out[:count].long()][:, None]
        codes = torch.bucketize(scaled, _borders(self.bits, vectors.device), out_int32=True)
        _pack(codes.to(torch.uint8).flatten(), self.bits, out[count:])

    def decode(self, payload: torch.Tensor, vectors: int, width: int) -> torch.Tensor:
        scales = _scales(payload.device)[payload[..., :vectors].long()]
        codes = _unpack(payload[..., vectors:], self.bits)[..., : vectors * width]
        numbers = _levels(self.bits, payload.device)[codes.long()]
        return numbers.unflatten(-1, (vectors, width)) * scales[..., None]


_QUANTISED = {"int8": 8, "int4": 4, "2bit": 2, "1bit": 1}

CODECS = ("raw", *_QUANTISED)
"""The names that `OtilConfig.codec` takes."""


def make_codec(name: str, dtype: torch.dtype) -> Codec:
    """The codec of that name, one of `CODECS`; `dtype` is that of the values."""
    return Quantised(_QUANTISED[name]) if name in _QUANTISED else Raw(dtype)


def _pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Write codes, uint8 [M] below 2**bits, into the bytes of `out`, the first one into the lowest bits."""
    per_byte = 8 // bits
    if codes.numel() % per_byte:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte))
    lanes = codes.view(-1, per_byte)
    out.copy_(lanes[:, 0])
    for lane in range(1, per_byte):
        out |= lanes[:, lane] << (bits * lane)


def _unpack(payload: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in bytes, uint8 [..., M]: [..., M * 8 // bits]."""
    if bits == 8:
        return payload
    shifts = _shifts(bits, payload.device)
    return ((payload[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


@cache
def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


@cache
def _scales(device: torch.device) -> torch.Tensor:
    """What each byte of a scale stands for; float32 [256]."""
    return torch.exp2((torch.arange(256, dtype=torch.float64) - _ZERO) / _OCTAVE).float().to(device)


@cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    """What each code stands for, at scale 1, in rising order; float32 [2**bits], or 255 for 8 bits."""
    if bits == 8:
        return (torch.arange(-127, 128) / 127).to(device)
    positive = torch.tensor(_GAUSSIAN[bits])
    return torch.cat([-positive.flip(0), positive]).to(device)


@cache
def _borders(bits: int, device: torch.device) -> torch.Tensor:
    """Where one code ends and the next begins: halfway between their levels."""
    levels = _levels(bits, device)
    return (levels[1:] + levels[:-1]) / 2
