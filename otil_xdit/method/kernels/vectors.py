"""Short vectors in 8 bits a number: what a bucket's halo rows are coded as, and what they are read as.

`encode_vectors` and `decode_vectors` do what `otil_xdit.method.codec.Quantised` does with 8 bits. One launch each.

Shapes: V vectors, C numbers of each, a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.payloads import scale_byte

_VECTORS = 16
"""Vectors of a program."""


@triton.jit
def _encode_vectors(
    vectors, scale_bytes, codes, scales, count, octave, zero, step, middle, highest,
    C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Some vectors: each one's scale, and its codes by that."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    inside = vector < count
    at = vector.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    numbers = tl.load(vectors + at, mask=inside[:, None], other=0.0).to(tl.float32)
    byte = scale_byte(tl.max(tl.abs(numbers), 1), octave, zero, True)
    tl.store(scale_bytes + vector, byte.to(tl.uint8), mask=inside)
    places = numbers * (1.0 / (tl.load(scales + byte) * step))[:, None] + middle
    code = tl.minimum(tl.maximum(places, 0.0), highest).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _decode_vectors(
    scale_bytes, codes, vectors, levels, scales, count, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Some vectors, in their own dtype."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    inside = vector < count
    at = vector.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    scale = tl.load(scales + tl.load(scale_bytes + vector, mask=inside, other=0).to(tl.int32))
    code = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    numbers = tl.load(levels + code) * scale[:, None]
    tl.store(vectors + at, numbers.to(vectors.dtype.element_ty), mask=inside[:, None])


def launch_encode_vectors(
    vectors: torch.Tensor,
    scale_bytes: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    octave: float,
    zero: float,
    step: float,
    middle: float,
    highest: float,
) -> None:
    """Write the scales and codes of vectors.

    Args:
        vectors: float [V, C], contiguous.
        scale_bytes, codes: become them, uint8 [V] and [V, C], contiguous.
        scales: what the bytes of scales stand for, float32 [256].
        octave, zero, step, middle, highest: of the codec; see `otil_xdit.method.codec.Quantised`.
    """
    count, width = vectors.shape
    _encode_vectors[(triton.cdiv(count, _VECTORS),)](
        vectors, scale_bytes, codes, scales, count, octave, zero, step, middle, highest, C=width, VECTORS=_VECTORS
    )  # fmt: skip


def launch_decode_vectors(
    scale_bytes: torch.Tensor, codes: torch.Tensor, vectors: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor
) -> None:
    """Read vectors from their scales and codes.

    Args:
        scale_bytes, codes: uint8 [V] and [V, C], contiguous.
        vectors: become what they stand for, float [V, C], contiguous.
        levels, scales: what codes and scales' bytes stand for, float32 [256] each.
    """
    count, width = vectors.shape
    _decode_vectors[(triton.cdiv(count, _VECTORS),)](
        scale_bytes, codes, vectors, levels, scales, count, C=width, VECTORS=_VECTORS,
        enable_fp_fusion=False,  # the same bits on all ranks, whatever compiled the kernel
    )  # fmt: skip


encode_vectors = torch.library.custom_op(
    "otil_xdit::encode_vectors", launch_encode_vectors, mutates_args=("scale_bytes", "codes")
)
"""`launch_encode_vectors`, as an operator of torch."""

decode_vectors = torch.library.custom_op("otil_xdit::decode_vectors", launch_decode_vectors, mutates_args=("vectors",))
"""`launch_decode_vectors`, as an operator of torch."""


@encode_vectors.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


@decode_vectors.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""
