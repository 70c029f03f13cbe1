"""Velocities as they are stored: in 16 or 32 bits, or in float8_e5m2, whose byte is the upper one of a float16.

Not every card converts 8-bit numbers by itself, and Triton's interpreter does not round them, so they are bytes here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LARGEST = tl.constexpr(57344.0)
"""Of float8_e5m2."""


def stored(velocity: torch.Tensor) -> torch.Tensor:
    """Return velocities as kernels take them: as bytes where they have 8 bits."""
    return velocity.view(torch.uint8) if velocity.dtype.itemsize == 1 else velocity


@triton.jit
def load_velocity(velocity, at, inside):
    """Return velocities, float32; 0 where there are none."""
    found = tl.load(velocity + at, mask=inside, other=0)
    if velocity.dtype.element_ty == tl.uint8:
        found = (found.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    return found.to(tl.float32)


@triton.jit
def store_velocity(velocity, at, found, inside):
    """Write velocities, float32, rounded to the nearest; of 8 bits the largest where they would become infinite."""
    if velocity.dtype.element_ty == tl.uint8:
        found = tl.minimum(tl.maximum(found, -_LARGEST), _LARGEST)
        bits = found.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = (bits + 127 + ((bits >> 8) & 1)) >> 8
    tl.store(velocity + at, found.to(velocity.dtype.element_ty), mask=inside)
