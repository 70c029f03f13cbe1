"""Byte buffers of one bucket: the offset of each layer's tensors in a message.

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
"""The ranks that a message goes to and comes from: the one before, the one after, or all."""


Sizes = Counter[tuple[Literal["out", "in"], Direction, Literal["message", "values"]]]
"""Bytes of the buffers of a bucket: of the messages, and of the values that are coded in them."""


DIRECTIONS: tuple[Direction, ...] = ("previous", "next", "everybody")


_ALIGNMENT = 16
"""Bytes; a buffer's length is a multiple of it, so that it can be viewed in any dtype."""


_CODEC = Quantised(8)


_VECTOR = 64
"""Numbers that share a scale: the largest that divides the rows of most maps, so that no two layers share one."""


_MOST_VIEWS = 1024
"""Views that a buffer keeps; a network asks for a few hundred, and images of other sizes for others."""


@dataclass(frozen=True)
class TensorSpec:
    """The tensors of one layer in a direction at a displaced step: those it sends, and those each rank there sends it.

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
    """A message in one direction: tensors as they are, and behind them the codes of all others.

    Args:
        ranks: P, the ranks in that direction.
    """

    def __init__(self, ranks: int) -> None:
        self._message, self._values = ByteBuffer(ranks), ByteBuffer(ranks)
        self._codes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers, used or not."""
        return self._message.nbytes + self._values.nbytes

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the message, and of the numbers that are coded in it, before coding."""
        return self._message.used, self._values.used

    def start(self, device: torch.device, message: int, values: int) -> None:
        """Begin a new message.

        Args:
            device: of the buffers.
            message, values: bytes to allocate of each; more are allocated when they are reserved.
        """
        for buffer, size in ((self._message, message), (self._values, values)):
            buffer.start(device)
            buffer.fit(size)

    def reserve(self, shape: tuple[int, ...], spec: TensorSpec) -> tuple[int, int, int]:
        """Reserve the bytes of a tensor.

        Args:
            shape: of the tensor.
            spec: its dtype, and whether it is coded.

        Returns:
            The tensor's offset, the bytes that it adds to the message, and the bytes of padding before it.
        """
        if not spec.coded:
            offset, padding = self._message.reserve(shape, spec.dtype)
            self._message.fit(self._message.used)
            return offset, math.prod(shape) * spec.dtype.itemsize, padding
        vectors = -(-math.prod(shape) // _VECTOR)
        offset, _ = self._values.reserve((vectors, _VECTOR), torch.float32)
        self._values.fit(self._values.used)
        if vectors * _VECTOR != math.prod(shape):  # what nobody writes must not raise the last scale
            self._values.at(offset, (vectors, _VECTOR), torch.float32)[0, -1].zero_()
        return offset, _CODEC.size(vectors, _VECTOR), 0

    def at(self, offset: int, shape: tuple[int, ...], spec: TensorSpec) -> torch.Tensor:
        """Return the tensors at an offset that `reserve` gave, [P, *shape]."""
        return (self._values if spec.coded else self._message).at(offset, shape, spec.dtype)

    def close(self) -> torch.Tensor:
        """Reserve the bytes of the codes, and return the message, uint8 [P, bytes]; nothing more can be reserved."""
        self._codes, _ = self._message.reserve((_CODEC.size(self._vectors, _VECTOR),), torch.uint8)
        self._message.fit(self._message.used)
        return self._message.message()

    def encode(self, scratch: ScratchBuffers) -> None:
        """Write the codes of the values into the message."""
        if vectors := self._vectors:
            numbers = self._values.at(0, (vectors, _VECTOR), torch.float32)[0]
            _CODEC.encode(numbers, self._coded()[0], scratch)

    def decode(self, scratch: ScratchBuffers) -> None:
        """Read the values from the codes in the message."""
        if vectors := self._vectors:
            levels, scales = _CODEC.decode(self._coded()[0], vectors, _VECTOR, scratch)
            assert scales is not None, "it quantises"
            torch.mul(levels, scales, out=self._values.at(0, (vectors, _VECTOR), torch.float32)[0])

    @property
    def _vectors(self) -> int:
        """Number of vectors that are coded."""
        return self._values.used // (_VECTOR * torch.float32.itemsize)

    def _coded(self) -> torch.Tensor:
        """Return the codes in the message, uint8 [P, bytes]."""
        return self._message.at(self._codes, (_CODEC.size(self._vectors, _VECTOR),), torch.uint8)


@dataclass
class ByteBuffer:
    """A growing buffer of bytes for one message to each or from each of P ranks, filled tensor by tensor.

    Attributes:
        ranks: P, the ranks in that direction.
        used: bytes of one message so far.
    """

    ranks: int
    used: int = 0
    _bytes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    # Views by offset: the same layers ask at every step, and making one takes longer than copying into it.
    _views: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, used or not."""
        return self._bytes.nbytes

    def start(self, device: torch.device) -> None:
        """Begin a new message."""
        self.used = 0
        if self._bytes.device != device:
            self._replace(torch.empty(0, dtype=torch.uint8, device=device))

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """Reserve the bytes of a tensor; return its offset in the message and the bytes of padding before it."""
        size = math.prod(shape) * dtype.itemsize
        padding = -self.used % dtype.itemsize if size else 0
        offset = self.used + padding
        self.used = offset + size
        return offset, padding

    def fit(self, size: int) -> None:
        """Grow the buffer to messages of `size` bytes; what is in it stays."""
        needed = -(-self.ranks * size // _ALIGNMENT) * _ALIGNMENT
        if needed > self._bytes.numel():
            larger = self._bytes.new_empty(needed)
            larger[: self._bytes.numel()] = self._bytes
            self._replace(larger)

    def at(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensors of all P messages at an offset, [P, *shape]."""
        key = (offset, self.used if self.ranks > 1 else 0, shape, dtype)
        found = self._views.get(key)
        if found is None:
            whole = self._bytes.view(dtype)
            strides = (self.used // dtype.itemsize, *(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = whole.as_strided((self.ranks, *shape), strides, offset // dtype.itemsize)
            self._views[key] = found
        return found

    def message(self) -> torch.Tensor:
        """Return the bytes that have been reserved, uint8 [P, used]."""
        return self._bytes[: self.ranks * self.used].view(self.ranks, self.used)

    def _replace(self, larger: torch.Tensor) -> None:
        """Take another tensor for the buffer; views of the old one are discarded."""
        self._bytes = larger
        self._views.clear()
