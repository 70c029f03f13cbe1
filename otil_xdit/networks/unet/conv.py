"""A convolution at the border of a patch: it pads its rows with the neighbours' instead of zeros.

Shapes: B batch, C channels, h rows of this rank, W columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.method.memory_format import is_channels_last
from otil_xdit.networks.class_swap import subclass_of
from otil_xdit.networks.handles import define_operator, owner_of
from otil_xdit.networks.unet.context import CONTEXT, LayerContext, check_forward, handle_of, running_context


def halo_rows(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the numbers of rows needed above and below a patch that begins and ends at multiples of the stride.

    Output row j reads the input rows j * stride - padding + dilation * (0 .. kernel - 1).
    """
    (kernel, _), (stride, _), (dilation, _) = conv.kernel_size, conv.stride, conv.dilation
    padding = conv.padding[0]
    assert isinstance(padding, int), "string paddings are refused by check_conv"
    return padding, max(dilation * (kernel - 1) + 1 - stride - padding, 0)


def check_conv(conv: nn.Conv2d, name: str) -> None:
    """Validate that a convolution on patches gives what it gives on the whole map.

    Raises:
        ValueError: naming the layer and its setting.
    """
    check_forward(conv, nn.Conv2d, name)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"--parallel does not support the padding of the layer {name} ({conv.padding!r}, {conv.padding_mode}); "
            "it knows zeros, by number"
        )
    if conv.stride[0] not in (1, 2):
        raise ValueError(f"--parallel does not support the stride {conv.stride} of the layer {name}; it knows 1 and 2")


@cache
def patched_conv(kind: type) -> type:
    """Derive from `kind`, `nn.Conv2d` or a subclass that computes the same, the class of a convolution on patches."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, input)  # type: ignore[attr-defined]  # see check_conv
        above, below = halo_rows(self)
        if torch.compiler.is_compiling():
            handle = handle_of(context)
            padded = _halo_operator(handle.number, handle.order, input, above, below)
        else:
            padded = _pad_with_halo(context, input, above, below)
        if context.exchange.is_last and self.padding[0] > below:
            # The image's lower edge: zeros for as many rows as one device pads, not only as many as a patch reads.
            padded = functional.pad(padded, (0, 0, 0, self.padding[0] - below))
        only_columns = (0, self.padding[1])
        return functional.conv2d(padded, self.weight, self.bias, self.stride, only_columns, self.dilation, self.groups)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


def _pad_with_halo(context: LayerContext, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
    """Return [B, C, h, W] with the neighbours' rows, [B, C, above + h + below, W]."""
    # The group norm in front of this layer may have fetched them together with its moments.
    precomputed = context.exchange.prefetched_halo(context, x, above, below)
    return context.exchange.halo(context, x, above, below, precomputed)


def _compute(number: torch.Tensor, order: torch.Tensor, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
    return _pad_with_halo(owner_of(number), x, above, below).clone()


def _like(number: torch.Tensor, order: torch.Tensor, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
    batch, channels, rows, width = x.shape
    height = above + rows + below
    if is_channels_last(x):
        return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return x.new_empty(batch, channels, height, width)


_halo_operator = define_operator("halo", "Tensor x, int above, int below", "Tensor", _compute, _like)
"""`_pad_with_halo` in a compiled graph."""
