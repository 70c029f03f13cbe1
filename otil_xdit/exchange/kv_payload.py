"""The payload of a group of layers: where each part lies in its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otil_xdit.method.codec import make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.selection import blocks_to_send

_ALIGNMENT = 16
"""Bytes; each layer's payload, and what a codec writes in it, starts at a multiple of it, to be viewed in any dtype."""


@dataclass(frozen=True)
class PayloadLayout:
    """What lies where in one layer's payload: [gains, error, indices, padding, coded tokens, padding], in bytes.

    Attributes:
        gains, error, indices: where each ends.
        coded: where the coded tokens start.
        size: bytes in all.
        count: sub-blocks sent, k; 0 where everything is.
        vectors: V.
    """

    gains: int
    error: int
    indices: int
    coded: int
    size: int
    count: int
    vectors: int

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor, config: OtilConfig) -> PayloadLayout:
        """The layout of a layer whose ranks have keys and values of `shape`, [2, B, S, C], and sub-blocks [K, T]."""
        _, batch, tokens, width = shape
        blocks, block_tokens = table.shape
        count = 0 if config.ratio >= 1 else blocks_to_send(blocks, config.ratio)
        vectors = 2 * batch * (count * block_tokens or tokens)
        gains = 8 if config.extrapolation == "fitted" else 0
        error = gains + (4 if config.tolerance else 0)
        indices = error + 4 * count
        coded = _aligned(indices)
        size = _aligned(coded + make_codec(config.codec, dtype).size(vectors, width))
        return cls(gains, error, indices, coded, size, count, vectors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
