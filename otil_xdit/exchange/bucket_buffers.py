"""Messages of one bucket: the offset of each layer's tensors, and what is coded of them.

Shapes: P ranks that send or are sent to, V vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from otil_xdit.exchange.byte_buffer import ByteBuffer
from otil_xdit.method.codec import Quantised
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.scratch import ScratchBuffers

Direction = Literal["previous", "next", "everybody"]
"""The ranks that a message goes to and comes from: the one before, the one after, or all."""


Sizes = Counter[tuple[Literal["out", "in"], Direction, Literal["message", "values"]]]
"""Bytes of the buffers of a bucket: of the messages, and of the values that are coded in them."""


DIRECTIONS: tuple[Direction, ...] = ("previous", "next", "everybody")


_CODEC = Quantised(8)


_ENCODING = ("scales", "octave", "zero", "step", "middle", "highest")
"""What the kernel needs of the codec, of all that its kernels may ask for."""


_VECTOR = 64
"""Numbers that share a scale: the largest that divides the rows of most maps, so that no two layers share one."""


@dataclass(frozen=True)
class TensorSpec:
    """The tensors of one layer in a direction at a displaced step: those it sends, and those each rank there sends it.

    Sizes may differ and be 0, but what one rank sends is what the other expects: `sent` of the rank before on ``next``
    is `received` of this one on ``previous``.

    Attributes:
        dtype: as it is written and read; float32 if it is coded, but for where kernels code (`is_fused`).
        coded: whether it travels in 8 bits a number and a byte for `_VECTOR` of them; to a neighbour only.
    """

    direction: Direction
    sent: tuple[int, ...]
    received: tuple[int, ...]
    dtype: torch.dtype
    coded: bool = False


@dataclass
class _Run:
    """Vectors of one dtype that are coded one behind another.

    Attributes:
        offset: of the first of them among the values, bytes.
        first, count: of the vectors, among all of the message.
    """

    dtype: torch.dtype
    offset: int
    first: int
    count: int


class MessageBuffer(ABC):
    """A message in one direction: tensors as they are, and behind them the codes of all others.

    Args:
        ranks: P, the ranks in that direction.
    """

    def __init__(self, ranks: int) -> None:
        self._message, self._values = ByteBuffer(ranks), ByteBuffer(ranks)
        self._runs: list[_Run] = []
        self._codes = 0
        self._by_kernels = False

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
        self._runs.clear()
        for buffer in (self._message, self._values):
            buffer.start(device)
        self._message.fit(message)
        self._by_kernels = is_fused(self._message.message())
        self._fit_values(values)

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
        vectors = _vectors_for(shape)
        offset, _ = self._values.reserve((vectors, _VECTOR), spec.dtype)
        self._fit_values(self._values.used)
        last = self._runs[-1] if self._runs else None
        if last is not None and last.dtype == spec.dtype:
            last.count += vectors
        elif vectors:
            self._runs.append(_Run(spec.dtype, offset, self._vectors, vectors))
        return offset, _CODEC.size(vectors, _VECTOR), 0

    def at(self, offset: int, shape: tuple[int, ...], spec: TensorSpec) -> torch.Tensor:
        """Return the tensors at an offset that `reserve` gave, [P, *shape]."""
        return (self._values if spec.coded else self._message).at(offset, shape, spec.dtype)

    def close(self) -> torch.Tensor:
        """Reserve the bytes of the codes, and return the message, uint8 [P, bytes]; nothing more can be reserved."""
        self._codes, _ = self._message.reserve((_CODEC.size(self._vectors, _VECTOR),), torch.uint8)
        self._message.fit(self._message.used)
        return self._message.message()

    @abstractmethod
    def _fit_values(self, size: int) -> None:
        """Make room for `size` bytes of values before the message is coded, or read."""

    @property
    def _vectors(self) -> int:
        """Number of vectors that are coded."""
        return self._runs[-1].first + self._runs[-1].count if self._runs else 0

    def _coded(self) -> torch.Tensor:
        """Return the codes in the message, uint8 [bytes]: a message from or to a neighbour."""
        return self._message.at(self._codes, (_CODEC.size(self._vectors, _VECTOR),), torch.uint8)[0]

    def _vectors_of(self, run: _Run) -> torch.Tensor:
        """Return a run's vectors, [V, `_VECTOR`]."""
        return self._values.at(run.offset, (run.count, _VECTOR), run.dtype)[0]

    def _coded_runs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield each run's vectors, their scales, uint8 [V], and their codes, uint8 [V, `_VECTOR`]."""
        scale_bytes, codes = _CODEC.split(self._coded(), self._vectors, _VECTOR)
        for run in self._runs:
            part = slice(run.first, run.first + run.count)
            yield self._vectors_of(run), scale_bytes[part], codes[part]


class OutgoingMessage(MessageBuffer):
    """A message that layers fill."""

    def reserve(self, shape: tuple[int, ...], spec: TensorSpec) -> tuple[int, int, int]:
        offset, size, padding = super().reserve(shape, spec)
        if spec.coded and math.prod(shape) % _VECTOR:  # what nobody writes must not raise the last scale
            self._values.at(offset, (_vectors_for(shape), _VECTOR), spec.dtype)[0, -1].zero_()
        return offset, size, padding

    def encode(self, scratch: ScratchBuffers) -> None:
        """Write the codes of the values into the message."""
        if not self._runs:
            return
        coded = self._coded()
        if not self._by_kernels:
            (run,) = self._runs  # float32, all of it
            _CODEC.encode(self._vectors_of(run), coded, scratch)
            return
        from otil_xdit.method.kernels.vectors import encode_vectors

        arguments, _ = _CODEC.kernel_arguments(coded.device, self._vectors, _VECTOR)
        for vectors, scale_bytes, codes in self._coded_runs():
            encode_vectors(vectors, scale_bytes, codes, **{name: arguments[name] for name in _ENCODING})

    def _fit_values(self, size: int) -> None:
        self._values.fit(size)


class IncomingMessage(MessageBuffer):
    """A message that is read. What kernels decode is the layers' own: each message's values get a buffer of their own.

    They are kept for the two steps that rows are extrapolated from, so they would have to be copied otherwise.
    """

    def decode(self, scratch: ScratchBuffers) -> None:
        """Read the values from the codes in the message."""
        if not self._runs:
            return
        coded = self._coded()
        if not self._by_kernels:
            (run,) = self._runs  # float32, all of it
            levels, scales = _CODEC.decode(coded, run.count, _VECTOR, scratch)
            assert scales is not None, "it quantises"
            torch.mul(levels, scales, out=self._vectors_of(run))
            return
        from otil_xdit.method.kernels.vectors import decode_vectors

        self._values.renew()
        _, arguments = _CODEC.kernel_arguments(coded.device, self._vectors, _VECTOR)
        for vectors, scale_bytes, codes in self._coded_runs():
            decode_vectors(scale_bytes, codes, vectors, **arguments)

    def release(self) -> None:
        """Leave values that kernels decoded to the layers that keep them."""
        if self._by_kernels:
            self._values.discard()

    def _fit_values(self, size: int) -> None:
        if not self._by_kernels:
            self._values.fit(size)


def _vectors_for(shape: tuple[int, ...]) -> int:
    """Return how many vectors hold the numbers of a tensor."""
    return -(-math.prod(shape) // _VECTOR)
