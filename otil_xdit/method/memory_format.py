"""In which order a map lies in memory."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Tell whether a tensor is a map whose channels lie next to each other, [B, C, rows, W], and not in both orders."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
