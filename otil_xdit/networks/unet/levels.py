"""Structure of a U-Net: the blocks of a pass in order, and the resolution of each layer."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")
"""Lists of a block that hold what it is made of."""


def blocks_of(network: Any) -> list[nn.Module]:
    """Return what a U-Net's pass goes through one after the other: residual blocks, transformers, resampling."""
    blocks = [*network.down_blocks, *([] if network.mid_block is None else [network.mid_block]), *network.up_blocks]
    lists = (getattr(block, name, None) for block in blocks for name in _PARTS)
    return [part for parts in lists for part in parts or () if part is not None]


class Levels:
    """Resolution of each layer of a U-Net: level 0 is the latent's, each further level has half the rows and columns.

    Args:
        network: a diffusers `UNet2DConditionModel`, or a `ControlNetModel`, which has no upper half.

    Raises:
        ValueError: for a network whose output is not of the size of its input.
    """

    def __init__(self, network: Any) -> None:
        self._down, self._up = [0], []
        for block in network.down_blocks:
            self._down.append(self._down[-1] + bool(block.downsamplers))
        level = self._down[-1]
        up_blocks = getattr(network, "up_blocks", ())
        for block in up_blocks:
            self._up.append(level)
            level -= bool(block.upsamplers)
        if up_blocks and level != 0:
            raise ValueError("--parallel does not support a U-Net whose output is not of the size of its input")

    @property
    def count(self) -> int:
        """Number of resolutions."""
        return self._down[-1] + 1

    def of(self, path: str) -> int:
        """Return the level of a layer's input; `path` is the name of the layer, or of a part of it, in the U-Net."""
        found = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)", path)
        if found is None:
            return self.count - 1 if path.startswith("mid_block") else 0
        number, part = int(found[2]), found[3]
        if found[1] == "down_blocks":
            return self._down[number]
        return self._up[number] - (part == "upsamplers")
