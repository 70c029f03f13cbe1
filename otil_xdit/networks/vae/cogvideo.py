"""`PatchedCogVideoCoder`: the encoder or the decoder of CogVideoX's VAE on patches.

It takes some frames at a time, and returns what its convolutions keep of them, of this rank's rows. The decoder's norms
read the latent's rows at the same place, which this rank has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from otil_xdit.networks.class_swap import base_name, subclass_of
from otil_xdit.networks.unet.context import CONTEXT, running_context
from otil_xdit.networks.unet.conv import patched_conv
from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.conv3d import patched_conv3d
from otil_xdit.networks.vae.levels import ClipLevels


def _changes_rows(module: nn.Module) -> bool:
    """Return whether a module doubles or halves the rows."""
    return base_name(module) in ("CogVideoXDownsample3D", "CogVideoXUpsample3D")


class PatchedCogVideoCoder(PatchedCoder):
    """One encoder or decoder whose layers reach the other ranks; see `PatchedCoder` for the arguments."""

    levels_of = partial(ClipLevels, changes_rows=_changes_rows)
    memory = "conv_cache"

    @staticmethod
    def derivation(module: nn.Module) -> Callable[[type], type] | None:
        if isinstance(module, nn.Conv3d):
            return patched_conv3d if module.kernel_size[1] > 1 else None
        is_downsampling = isinstance(module, nn.Conv2d) and module.stride == (2, 2) and module.padding == (0, 0)
        return _patched_downsampling if is_downsampling else None


@cache
def _patched_downsampling(kind: Any) -> type:
    patched: Any = patched_conv(kind)

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if running_context(self) is not None:
            # One device reads a row of zeros below the image, which a patch has too: its next row comes with the halo.
            input = input[..., :-1, :]
        return patched.forward(self, input)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
