"""A VAE encoder's down-sampling on patches: one device pads a row of zeros below the image, a patch has the next one.

Shapes: B batch, C channels, h rows of this rank, W columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from torch.nn import functional

from otil_xdit.networks.class_swap import subclass_of
from otil_xdit.networks.unet.context import CONTEXT, running_context


def pads_below(module: Any) -> bool:
    """Tell whether a module pads its input by a row below and a column to the right before its convolution."""
    return isinstance(module, Downsample2D) and bool(module.use_conv) and module.padding == 0 and module.norm is None


@cache
def patched_downsampling(kind: type) -> type:
    """Derive from `kind`, diffusers' `Downsample2D`, the class of one on patches."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if running_context(self) is None:
            return kind.forward(self, hidden_states, *args, **kwargs)  # type: ignore[attr-defined]  # Downsample2D
        # The row below comes with the halo of the convolution, and is zeros on the last rank only.
        out: torch.Tensor = self.conv(functional.pad(hidden_states, (0, 1, 0, 0)))
        return out

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
