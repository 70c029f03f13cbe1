"""`PatchedHunyuanCoder`: the encoder or the decoder of HunyuanVideo's VAEs on patches.

Their convolutions repeat the rows at the image's edge where others read zeros; rows of other ranks come with the halo.
Their middle attends from every place of a frame to all of that frame and of those before.

Shapes: B batch, C channels, T frames, h rows of this rank, W columns, S = T * h * W tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from otil_xdit.networks.class_swap import base_name, subclass_of
from otil_xdit.networks.unet.context import CONTEXT, running_context
from otil_xdit.networks.vae.coder import PatchedCoder, attend_places
from otil_xdit.networks.vae.conv3d import pad_with_rows
from otil_xdit.networks.vae.levels import ClipLevels


def _changes_rows(module: Any) -> bool:
    """Return whether a module doubles or halves the rows; some resample frames alone."""
    name = base_name(module)
    if name == "HunyuanVideoUpsampleCausal3D":
        return bool(module.upsample_factor[1] == 2)
    if name == "HunyuanVideoDownsampleCausal3D":
        return bool(module.conv.conv.stride[1] == 2)
    return name in ("HunyuanVideo15Upsample", "HunyuanVideo15Downsample")


class PatchedHunyuanCoder(PatchedCoder):
    """One encoder or decoder whose layers reach the other ranks; see `PatchedCoder` for the arguments."""

    levels_of = partial(ClipLevels, changes_rows=_changes_rows)

    @staticmethod
    def derivation(module: Any) -> Callable[[type], type] | None:
        name = base_name(module)
        if name.endswith("CausalConv3d"):
            return _patched_conv if module.time_causal_padding[2] > 0 else None
        return {"HunyuanVideoMidBlock3D": _patched_middle, "HunyuanVideo15AttnBlock": _patched_attention}.get(name)


@cache
def _patched_conv(kind: Any) -> type:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, hidden_states)
        return self.conv(pad_with_rows(context, hidden_states, self.conv, self.time_causal_padding, self.pad_mode))

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
        out = attend_places(context, self.to_q(normed), self.to_k(normed), self.to_v(normed))
        return x + self.proj_out(out)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
