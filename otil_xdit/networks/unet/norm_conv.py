"""Pairs of a group norm and the convolution that reads its output: one message serves both.

Normalisation and activation act on every value by itself once the moments are known. So a rank may be sent its
neighbours' rows as they are before the norm, together with the moments, and make of them what the convolution reads.

Shapes: B batch, C channels, h rows of this rank, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.nn.modules import module as torch_modules

from otil_xdit.exchange.halo import HaloRows, halo_key
from otil_xdit.networks.class_swap import is_swapped, subclass_of, swap_class

ACTIVATIONS = (nn.SiLU, nn.Mish, nn.GELU, nn.ReLU)
"""Activations that act on every value by itself: those that diffusers' blocks know."""


@dataclass(frozen=True, eq=False)
class NormConvPair:
    """A convolution that reads ``dropout(activation(norm(x)))``.

    Attributes:
        block: that calls them, one after the other.
        norm, activation, dropout: the modules; None for no dropout.
        reader: the module that is given the result: the convolution, or what holds it and its adapters (peft).
        conv: the convolution.
        reader_name, conv_name: names of `reader` and `conv` in the network.
    """

    block: nn.Module
    norm: nn.GroupNorm
    activation: nn.Module
    dropout: nn.Dropout | None
    reader: nn.Module
    conv: nn.Conv2d
    reader_name: str
    conv_name: str

    @property
    def hands_over(self) -> bool:
        """Tell whether the norm may give its activation what that makes of it, as nothing else is given it.

        A hook on all modules may put another tensor in its place, which would be activated again.
        """
        block, activation = self.block, self.activation
        is_own = "forward" not in vars(block) and "forward" not in vars(activation)
        is_hooked = block._forward_pre_hooks or torch_modules._global_forward_hooks
        return is_own and is_swapped(activation) and not (is_hooked or torch_modules._global_forward_pre_hooks)

    def is_intact(self) -> bool:
        """Tell whether nothing between norm and convolution is random or somebody else's.

        Hooks may change what they see; they must be registered on all ranks or on none, as ranks with and without
        one would wait for different messages.
        """
        if self.dropout is not None and self.dropout.training and self.dropout.p > 0:
            return False
        between = [self.activation] if self.dropout is None else [self.activation, self.dropout]
        after = any(module._forward_hooks for module in (self.norm, *between))
        before = any(module._forward_pre_hooks for module in (*between, self.reader, self.conv))
        return not (after or before)


@dataclass
class PrefetchedHalo:
    """The neighbours' rows as the convolution of a pair is to read them, for its next call.

    Attributes:
        pair: whose convolution reads them.
        rows: above and below, [B, C, rows, W]; None beyond the image's edge.
        key: `halo_key` of the map that they belong to.
    """

    pair: NormConvPair
    rows: HaloRows
    key: tuple[object, ...]
    _input: torch.Tensor | None = field(default=None, init=False)

    def rows_for(self, name: str, x: torch.Tensor, above: int, below: int) -> HaloRows | None:
        """Return the rows for the call of the convolution `name` on `x`, [B, C, h, W]; None for any other call.

        The pair's convolution reads them first, and after it those of its adapters, if they are given the same tensor.

        Args:
            name: of the convolution in the network.
            x: its input.
            above, below: numbers of rows that it needs.
        """
        if self.key != halo_key(x, above, below):
            return None
        if self._input is None:
            found = name == self.pair.conv_name
            self._input = x if found else None
        else:
            found = x is self._input and name.startswith(f"{self.pair.reader_name}.")
        return self.rows if found else None

    @property
    def is_consumed(self) -> bool:
        """Tell whether no further convolution can read the rows."""
        return self._input is not None and self.pair.reader is self.pair.conv


def find_norm_conv_pairs(network: Any) -> dict[str, NormConvPair]:
    """Return the pairs of a U-Net by the name of their norm; whatever is not exactly understood is left out."""
    found = (pair for path, block in network.named_modules() for pair in _pairs_of_block(path, block))
    return {norm: pair for norm, pair in found if pair is not None}


def _pairs_of_block(path: str, block: Any) -> Iterator[tuple[str, NormConvPair | None]]:
    if isinstance(block, UNet2DConditionModel) and block.conv_norm_out is not None:
        yield "conv_norm_out", _pair(block, block.conv_norm_out, block.conv_act, None, block.conv_out, "conv_out")
    if type(block).forward is not ResnetBlock2D.forward:
        return
    if block.upsample is None and block.downsample is None:
        yield f"{path}.norm1", _pair(block, block.norm1, block.nonlinearity, None, block.conv1, f"{path}.conv1")
    if block.time_embedding_norm == "default":
        yield (
            f"{path}.norm2",
            _pair(block, block.norm2, block.nonlinearity, block.dropout, block.conv2, f"{path}.conv2"),
        )


def _pair(block: nn.Module, norm: Any, activation: Any, dropout: Any, reader: Any, name: str) -> NormConvPair | None:
    conv, conv_name = reader, name
    if type(reader).__module__.startswith("peft.tuners.lora."):
        conv, conv_name = reader.base_layer, f"{name}.base_layer"
    known = (
        isinstance(norm, nn.GroupNorm)
        and getattr(type(activation), "_otil_base", type(activation)) in ACTIVATIONS
        and (dropout is None or type(dropout) is nn.Dropout)
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size[0] > 1
    )
    return NormConvPair(block, norm, activation, dropout, reader, conv, name, conv_name) if known else None


_GIVEN = "_otil_given"
"""Of a wrapped activation: what a norm has made that is activated already."""


def wrap_activation(activation: nn.Module) -> None:
    """Let norms give SiLU what they have activated themselves, which it returns as it is; others stay as they are."""
    if type(activation) is nn.SiLU:
        swap_class(activation, _patched_activation)


def forget_activated(module: nn.Module) -> None:
    """Forget what an activation was given and not called with; any other module stays as it is."""
    vars(module).pop(_GIVEN, None)


def give_activated(activation: nn.Module, activated: torch.Tensor) -> torch.Tensor:
    """Return what an activation is to return as it is, when it is called with that very tensor."""
    vars(activation)[_GIVEN] = activated
    return activated


@cache
def _patched_activation(kind: type) -> type:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if input is vars(self).get(_GIVEN):
            del vars(self)[_GIVEN]
            return input
        out: torch.Tensor = kind.forward(self, input)  # type: ignore[attr-defined]  # a class of modules
        return out

    return subclass_of(kind, {"forward": forward})
