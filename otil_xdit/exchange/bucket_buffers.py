"""Byte buffers of one bucket: where each layer's tensors lie in a message.

Shapes: P ranks that send or are sent to, V vectors.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch

from otil_xdit.method.codec import Quantised
from otil_xdit.method.scratch import ScratchBuffers

Direction = Literal["previous", "next", "everybody"]
"""Where a part goes, and whence the answer comes: the rank before, the rank after, or all ranks."""


Sizes = Counter[tuple[Literal["out", "in"], Direction, Literal["message", "values"]]]
"""Bytes of the buffers of a bucket: of what is sent and received, and of what is coded in it."""


_DIRECTIONS: tuple[Direction, ...] = ("previous", "next", "everybody")


_ALIGNMENT = 16
"""Bytes; a buffer's length is a multiple of it, so that it can be viewed in any dtype."""


_CODEC = Quantised(8)


_VECTOR = 64
"""Numbers that share a scale: the largest that divides the rows of most maps, so that no two layers share one."""


_MOST_VIEWS = 1024
"""Views that a buffer keeps; a network asks for a few hundred, and images of other sizes for others."""


@dataclass(frozen=True)
class TensorSpec:
    """What one layer sends in a direction at a displaced step, and what each rank there sends it for the same call.

    Sizes may differ and be 0, but what one rank sends is what the other expects: `sent` of the rank before on ``next``
    is `received` of this one on ``previous``.

    Attributes:
        dtype: as it is written and read; float32 if it is coded.
        coded: whether it travels in 8 bits a number and a byte for `_VECTOR` of them; to a neighbour only.
    """

    direction: Direction
    sent: tuple[int, ...]
    received: tuple[int, ...]
    dtype: torch.dtype
    coded: bool = False


class MessageBuffer:
    """What goes to, or comes from, one direction: tensors as they are, and behind them the codes of all others.

    Args:
        ranks: P, the ranks in that direction.
    """

    def __init__(self, ranks: int) -> None:
        self._message, self._values = ByteBuffer(ranks), ByteBuffer(ranks)
        self._codes = 0

    @property
    def nbytes(self) -> int:
        return self._message.nbytes + self._values.nbytes

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the message, and of the numbers that are coded in it before they are."""
        return self._message.used, self._values.used

    def start(self, device: torch.device, message: int, values: int) -> None:
        """Begin a new message, with room for so many bytes of each."""
        for buffer, size in ((self._message, message), (self._values, values)):
            buffer.start(device)
            buffer.fit(size)

    def reserve(self, shape: tuple[int, ...], spec: TensorSpec) -> tuple[int, int, int]:
        """The place of a tensor in bytes, what it adds to the message, and what is added before it as padding."""
        if not spec.coded:
            place, padding = self._message.reserve(shape, spec.dtype)
            self._message.fit(self._message.used)
            return place, math.prod(shape) * spec.dtype.itemsize, padding
        vectors = -(-math.prod(shape) // _VECTOR)
        place, _ = self._values.reserve((vectors, _VECTOR), torch.float32)
        self._values.fit(self._values.used)
        if vectors * _VECTOR != math.prod(shape):  # what nobody writes must not raise the last scale
            self._values.at(place, (vectors, _VECTOR), torch.float32)[0, -1].zero_()
        return place, _CODEC.size(vectors, _VECTOR), 0

    def at(self, place: int, shape: tuple[int, ...], spec: TensorSpec) -> torch.Tensor:
        """The tensors at a place, [P, *shape]."""
        return (self._values if spec.coded else self._message).at(place, shape, spec.dtype)

    def sealed(self) -> torch.Tensor:
        """The message, uint8 [P, bytes]; nothing can be reserved any more."""
        self._codes, _ = self._message.reserve((_CODEC.size(self._vectors, _VECTOR),), torch.uint8)
        self._message.fit(self._message.used)
        return self._message.message()

    def encode(self, scratch: ScratchBuffers) -> None:
        """Write the codes."""
        if vectors := self._vectors:
            numbers = self._values.at(0, (vectors, _VECTOR), torch.float32)[0]
            _CODEC.encode(numbers, self._coded()[0], scratch)

    def decode(self, scratch: ScratchBuffers) -> None:
        """Read the codes."""
        if vectors := self._vectors:
            levels, scales = _CODEC.decode(self._coded()[0], vectors, _VECTOR, scratch)
            assert scales is not None, "it quantises"
            torch.mul(levels, scales, out=self._values.at(0, (vectors, _VECTOR), torch.float32)[0])

    @property
    def _vectors(self) -> int:
        """Number of vectors that are coded."""
        return self._values.used // (_VECTOR * torch.float32.itemsize)

    def _coded(self) -> torch.Tensor:
        return self._message.at(self._codes, (_CODEC.size(self._vectors, _VECTOR),), torch.uint8)


@dataclass
class ByteBuffer:
    """A growing buffer of bytes for one message to each or from each of P ranks, filled place by place.

    Attributes:
        ranks: P, the ranks in that direction.
        used: bytes of one message so far.
    """

    ranks: int
    used: int = 0
    _bytes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    # Views by place: the same layers ask at every step, and making one takes longer than copying into it.
    _views: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self._bytes.nbytes

    def start(self, device: torch.device) -> None:
        """Begin a new message."""
        self.used = 0
        if self._bytes.device != device:
            self._replace(torch.empty(0, dtype=torch.uint8, device=device))

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """The place of a tensor in the message, in bytes, and the bytes before it that are padding."""
        size = math.prod(shape) * dtype.itemsize
        padding = -self.used % dtype.itemsize if size else 0
        place = self.used + padding
        self.used = place + size
        return place, padding

    def fit(self, size: int) -> None:
        """Make room for messages of `size` bytes; what is there stays."""
        needed = -(-self.ranks * size // _ALIGNMENT) * _ALIGNMENT
        if needed > self._bytes.numel():
            larger = self._bytes.new_empty(needed)
            larger[: self._bytes.numel()] = self._bytes
            self._replace(larger)

    def at(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensors of all P messages at a place, [P, *shape]."""
        key = (place, self.used if self.ranks > 1 else 0, shape, dtype)
        found = self._views.get(key)
        if found is None:
            whole = self._bytes.view(dtype)
            strides = (self.used // dtype.itemsize, *(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = whole.as_strided((self.ranks, *shape), strides, place // dtype.itemsize)
            self._views[key] = found
        return found

    def message(self) -> torch.Tensor:
        """What has been reserved, uint8 [P, used]."""
        return self._bytes[: self.ranks * self.used].view(self.ranks, self.used)

    def _replace(self, larger: torch.Tensor) -> None:
        self._bytes = larger
        self._views.clear()
