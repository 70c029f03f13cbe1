"""Convolutions over frames and rows of a clip on patches.

All frames are on every rank, so rows alone are exchanged, of all frames in one message.

Shapes: B batch, C channels, T frames, h rows of this rank, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.networks.class_swap import subclass_of
from otil_xdit.networks.unet.context import CONTEXT, LayerContext, running_context
from otil_xdit.networks.vae.coder import PatchedCoder


def pad_with_rows(
    context: LayerContext, x: torch.Tensor, conv: nn.Conv3d, padding: Sequence[int], mode: str
) -> torch.Tensor:
    """Return a clip as one device pads it, with rows of other ranks where there are any.

    Args:
        context: the layer's, of a `PatchedCoder`.
        x: this rank's rows, [B, C, T, h, W].
        conv: what is to read the result.
        padding: of one device: left, right, above, below, before and after.
        mode: as of `functional.pad`.
    """
    coder = cast(PatchedCoder, context.exchange)
    left, right, above, below, before, after = padding
    read_below = max(conv.kernel_size[1] - conv.stride[1] - above, 0)
    merged = coder.halo(context, x.flatten(1, 2), above, read_below, None).unflatten(1, x.shape[1:3])
    top = bottom = 0
    if coder.is_first:
        top, merged = above, merged[..., above:, :]
    if coder.is_last:
        bottom, merged = below, merged[..., : merged.shape[-2] - read_below, :]
    return functional.pad(merged, (left, right, top, bottom, before, after), mode=mode)


@cache
def patched_conv3d(kind: Any) -> type:
    """Derive from `kind`, `nn.Conv3d` or a subclass that computes the same, the class of a convolution on patches."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, input)
        (before, above, left), zeros = self.padding, self.padding_mode == "zeros"
        padding = (left, left, above, above, before, before)
        padded = pad_with_rows(context, input, self, padding, "constant" if zeros else self.padding_mode)
        return kind.forward(self, padded)

    # What `kind.forward` calls, in one piece or in pieces of time (CogVideoX's), with rows that are padded already.
    def _conv_forward(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if running_context(self) is None:
            return kind._conv_forward(self, input, weight, bias)
        return functional.conv3d(input, weight, bias, self.stride, 0, self.dilation, self.groups)

    return subclass_of(kind, {"forward": forward, "_conv_forward": _conv_forward, CONTEXT: None})
