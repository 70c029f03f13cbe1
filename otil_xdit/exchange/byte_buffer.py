"""`ByteBuffer`: bytes that tensors of many shapes and dtypes are written to one behind another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

_ALIGNMENT = 16
"""Bytes; a buffer's length is a multiple of it, so that it can be viewed in any dtype."""


_MOST_VIEWS = 1024
"""Views that a buffer keeps; a network asks for a few hundred, and images of other sizes for others."""


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

    def renew(self) -> None:
        """Take a buffer that nobody has a view of for what is reserved; the old one stays with its views."""
        self.discard()
        self.fit(self.used)

    def discard(self) -> None:
        """Give the buffer back, or leave it to those who have views of it."""
        self._replace(self._bytes.new_empty(0))

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
