"""Resolution of each layer of a VAE's encoder or decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol


class Levels(Protocol):
    """Resolutions of an encoder or a decoder: level 0 is the image's, each further level has half the rows.

    Attributes:
        is_encoder: whether it begins with the image.
        count: of the levels.
    """

    is_encoder: bool
    count: int

    def of(self, path: str) -> int:
        """Return the level of a layer's input, by the layer's name."""
        ...


class ClipLevels:
    """Resolutions of an encoder or a decoder of clips: level 0 is the image's.

    Args:
        coder: a module with `down_blocks` or `up_blocks`.
        changes_rows: tells of each of its modules whether it doubles or halves the rows.
    """

    def __init__(self, coder: Any, changes_rows: Callable[[Any], bool]) -> None:
        self.is_encoder = hasattr(coder, "down_blocks")
        side = getattr(coder, "patch_size", 1)  # of the squares of pixels that LTX's first and last convolutions see
        self.count = side.bit_length() + sum(map(changes_rows, coder.modules()))

    def of(self, path: str) -> int:
        """Return the middle's level, in which attention is; norms ask for shares of rows, alike in all levels."""
        return self.count - 1


class CoderLevels:
    """Resolutions of an encoder or a decoder: level 0 is the image's, each further level has half the rows and columns.

    Args:
        coder: diffusers' `Encoder` or `Decoder`.
    """

    def __init__(self, coder: Any) -> None:
        self.is_encoder = hasattr(coder, "down_blocks")
        blocks = coder.down_blocks if self.is_encoder else coder.up_blocks
        resamples = [bool(block.downsamplers if self.is_encoder else block.upsamplers) for block in blocks]
        self.count = 1 + sum(resamples)
        self._of_block, level = [], 0 if self.is_encoder else self.count - 1
        for changes in resamples:
            self._of_block.append(level)
            level += changes if self.is_encoder else -changes

    def of(self, path: str) -> int:
        """Return the level of a layer's input; `path` is the name of the layer in the coder.

        An upsampler enlarges its input before its convolution reads it.
        """
        found = re.match(r"(?:down|up)_blocks\.(\d+)\.(\w+)", path)
        if found is not None:
            return self._of_block[int(found[1])] - (found[2] == "upsamplers")
        at_image = path == "conv_in" if self.is_encoder else path in ("conv_norm_out", "conv_out")
        return 0 if at_image else self.count - 1
