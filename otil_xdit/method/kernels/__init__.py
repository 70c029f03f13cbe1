"""The arithmetic of `otil_xdit.method` fused for CUDA, in Triton.

A step launches thousands of small kernels in eager PyTorch, which takes the host longer than the device. Here one
launch does what up to forty do. The eager code stays the reference, which tests compare with, and what the CPU runs.

Each operator is a `torch.library.custom_op` under ``otil_xdit::``: `torch.compile` and fake tensors know what it writes
to, and never look inside. All ranks of an image must take the same way, as their copies must be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

MOST_FEATURES = 8192
"""Of a vector that is encoded: one program holds it whole."""

MOST_BLOCKS = 16384
"""Sub-blocks of a layer that are compared with each other: one program does."""


_fused_on = {"cuda"}
"""Types of devices that have kernels."""


def is_fused(tensor: torch.Tensor) -> bool:
    """Tell whether what is computed of a tensor has kernels here: on CUDA, where Triton is installed."""
    return tensor.device.type in _fused_on and has_triton()


@contextmanager
def fused_on(device_type: str) -> Iterator[None]:
    """Let tensors there take the way that tensors on CUDA take.

    Those on "meta" do it for a dry run of what a card would be asked, those on the CPU in Triton's interpreter.
    """
    before = set(_fused_on)
    _fused_on.add(device_type)
    try:
        yield
    finally:
        _fused_on.intersection_update(before)


@cache
def has_triton() -> bool:
    """Tell whether the kernels' language is installed."""
    return find_spec("triton") is not None
