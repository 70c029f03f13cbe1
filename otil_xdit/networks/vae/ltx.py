"""`PatchedLtxCoder`: the encoder or the decoder of LTX's VAEs on patches.

Their convolutions pad rows by zeros or mirror them at the image's edge. Norms look at one place at a time, and nothing
attends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from otil_xdit.networks.class_swap import base_name
from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.conv3d import patched_conv3d
from otil_xdit.networks.vae.levels import ClipLevels


def _changes_rows(module: Any) -> bool:
    """Return whether a module doubles or halves the rows; some resample frames alone."""
    resamples = isinstance(module, nn.Conv3d) or base_name(module).endswith(("Downsampler3d", "Upsampler3d"))
    return bool(resamples and module.stride[1] == 2)


class PatchedLtxCoder(PatchedCoder):
    """One encoder or decoder whose layers reach the other ranks; see `PatchedCoder` for the arguments."""

    levels_of = partial(ClipLevels, changes_rows=_changes_rows)
    takes_arguments = True  # the timestep, and whether frames see later ones

    @staticmethod
    def derivation(module: nn.Module) -> Callable[[type], type] | None:
        return patched_conv3d if isinstance(module, nn.Conv3d) and module.kernel_size[1] > 1 else None
