"""`PatchedHunyuanCoder`: the encoder or the decoder of HunyuanVideo's VAEs on patches.

Their convolutions repeat the rows at the image's edge where others read zeros; rows of other ranks come with the halo.
Their middle attends from every place of a frame to all of that frame and of those before.

Shapes: B batch, C channels, T frames, h rows of this rank, W columns, S = T * h * W tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.networks.class_swap import base_name, subclass_of
from otil_xdit.networks.unet.context import CONTEXT, running_context
from otil_xdit.networks.vae.coder import PatchedCoder


class HunyuanLevels:
    """Resolutions of an encoder or a decoder: level 0 is the image's.

    Args:
        coder: of HunyuanVideo's VAE or of HunyuanVideo 1.5's.
    """

    def __init__(self, coder: nn.Module) -> None:
        self.is_encoder = hasattr(coder, "down_blocks")
        self.count = 1 + sum(map(_changes_rows, coder.modules()))

    def of(self, path: str) -> int:
        """Return the middle's level, in which attention is; norms ask for shares of rows, alike in all levels."""
        return self.count - 1


class PatchedHunyuanCoder(PatchedCoder):
    """One encoder or decoder whose layers reach the other ranks; see `PatchedCoder` for the arguments."""

    levels_of = HunyuanLevels

    @staticmethod
    def derivation(module: Any) -> Callable[[type], type] | None:
        name = base_name(module)
        if name.endswith("CausalConv3d"):
            return _patched_conv if module.time_causal_padding[2] > 0 else None
        return {"HunyuanVideoMidBlock3D": _patched_middle, "HunyuanVideo15AttnBlock": _patched_attention}.get(name)


def _changes_rows(module: Any) -> bool:
    """Return whether a module doubles or halves the rows; some resample frames alone."""
    name = base_name(module)
    if name == "HunyuanVideoUpsampleCausal3D":
        return bool(module.upsample_factor[1] == 2)
    if name == "HunyuanVideoDownsampleCausal3D":
        return bool(module.conv.conv.stride[1] == 2)
    return name in ("HunyuanVideo15Upsample", "HunyuanVideo15Downsample")


@cache
def _patched_conv(kind: Any) -> type:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, hidden_states)
        coder = cast(PatchedHunyuanCoder, context.exchange)
        left, right, above, below, before, after = self.time_causal_padding  # of one device: columns, rows, frames
        read_below = max(self.conv.kernel_size[1] - self.conv.stride[1] - above, 0)
        merged = coder.halo(context, hidden_states.flatten(1, 2), above, read_below, None)
        merged = merged.unflatten(1, hidden_states.shape[1:3])
        top = bottom = 0
        if coder.is_first:
            top, merged = above, merged[..., above:, :]
        if coder.is_last:
            bottom, merged = below, merged[..., : merged.shape[-2] - read_below, :]
        return self.conv(functional.pad(merged, (left, right, top, bottom, before, after), mode=self.pad_mode))

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


@cache
def _patched_middle(kind: Any) -> type:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if running_context(self) is None:
            return kind.forward(self, hidden_states)
        x = self.resnets[0](hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:  # without the mask of S x S: which frames are attended to is the coder's to know
                tokens = attention(x.flatten(2).transpose(1, 2))
                x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
            x = resnet(x)
        return x

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


@cache
def _patched_attention(kind: Any) -> type:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, x)
        normed = self.norm(x)
        tokens = (project(normed).flatten(2).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        out = context.exchange.attend(context, *(one.unsqueeze(1) for one in tokens))
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
