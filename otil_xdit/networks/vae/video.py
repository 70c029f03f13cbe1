"""`PatchedVideoCoder`: the encoder or the decoder of Wan's and Qwen-Image's VAEs on patches.

Their convolutions reach over frames and rows. Frames come one after the other, and what a convolution keeps of earlier
ones is kept of this rank's rows, so rows alone are exchanged. Norms look at one place at a time. The attention in the
middle is within a frame.

Shapes: B batch, C channels, T frames, h rows of this rank, W columns, S tokens of this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.networks.class_swap import base_name, subclass_of
from otil_xdit.networks.unet.context import CONTEXT, running_context
from otil_xdit.networks.vae.coder import PatchedCoder, attend_places
from otil_xdit.networks.vae.conv3d import pad_with_rows
from otil_xdit.networks.vae.levels import ClipLevels


def _changes_rows(module: Any) -> bool:
    """Return whether a module doubles or halves the rows."""
    return hasattr(module, "resample") and module.mode.startswith(("upsample", "downsample"))


class PatchedVideoCoder(PatchedCoder):
    """One encoder or decoder whose layers reach the other ranks; see `PatchedCoder` for the arguments."""

    levels_of = partial(ClipLevels, changes_rows=_changes_rows)
    takes_arguments = True

    @staticmethod
    def derivation(module: nn.Module) -> Callable[[type], type] | None:
        name = base_name(module)
        if name.endswith("CausalConv3d") and isinstance(module, nn.Conv3d) and module.kernel_size[1] > 1:
            return _patched_conv
        if name.endswith("AttentionBlock"):
            return _patched_attention
        return _patched_padding if isinstance(module, nn.ZeroPad2d) else None


@cache
def _patched_conv(kind: Any) -> type:
    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, x, cache_x)
        left, right, above, below, before, _ = self._padding  # of one device: columns, rows, frames
        if cache_x is not None and before > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            before -= cache_x.shape[2]
        padded = pad_with_rows(context, x, self, (left, right, above, below, before, 0), "constant")
        return functional.conv3d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


@cache
def _patched_attention(kind: Any) -> type:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, x)
        frames = x.transpose(1, 2).flatten(0, 1)
        out = attend_places(context, *self.to_qkv(self.norm(frames)).chunk(3, dim=1))
        return x + self.proj(out).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


@cache
def _patched_padding(kind: Any) -> type:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if running_context(self) is None:
            return kind.forward(self, input)
        # The row below comes with the halo of the convolution, and is zeros on the last rank only.
        left, right, above, _ = self.padding
        assert above == 0, "an encoder pads below and to the right"
        return functional.pad(input, (left, right, 0, 0))

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
