"""What is known of a U-Net before it runs: whether patches can serve it, and at which resolution each layer works."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "NoneType")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Blocks of diffusers that are built of the layers which `otil_xdit.networks.unet.layers` knows."""

_SETTINGS: dict[str, tuple[Any, ...]] = {
    "downsample_padding": (1,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj", "ip_image_proj"),
    "dual_cross_attention": (False, None),
    "conv_in_kernel": (1, 3),
    "conv_out_kernel": (1, 3),
}
"""Settings of a `UNet2DConditionModel` and the values under which patches give what one device gives."""

_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")
"""Lists of a block that hold what it is made of."""

_SPATIAL = (
    nn.ConvTranspose2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.Upsample,
)
"""Layers that look beyond a patch and that no wrapper serves."""


def check_supported(network: Any) -> None:
    """Raises `ValueError` naming what of a U-Net patches cannot serve."""
    kinds = {
        "down block": (DOWN_BLOCKS, network.down_blocks),
        "mid block": (MID_BLOCKS, [network.mid_block]),
        "up block": (UP_BLOCKS, network.up_blocks),
    }
    for what, (known, blocks) in kinds.items():
        for block in blocks:
            if type(block).__name__ not in known:
                raise ValueError(
                    f"--parallel does not support a U-Net with the {what} {type(block).__name__}; it knows "
                    f"{', '.join(name for name in known if name != 'NoneType')}"
                )
    for setting, accepted in _SETTINGS.items():
        value = network.config.get(setting, accepted[0])
        if value not in accepted:
            raise ValueError(
                f"--parallel does not support a U-Net with {setting} = {value!r}; it knows "
                f"{', '.join(repr(choice) for choice in accepted)}"
            )
    for path, module in network.named_modules():
        if isinstance(module, _SPATIAL):
            raise ValueError(f"--parallel does not support the layer {path} ({type(module).__name__}) of a U-Net")


def blocks_of(network: Any) -> list[nn.Module]:
    """The parts that a U-Net's pass goes through one after the other: residual blocks, transformers, resampling."""
    blocks = [*network.down_blocks, *([] if network.mid_block is None else [network.mid_block]), *network.up_blocks]
    lists = (getattr(block, name, None) for block in blocks for name in _PARTS)
    return [part for parts in lists for part in parts or () if part is not None]


class Levels:
    """At which resolution each layer of a U-Net works; level 0 is the latent's, each further one half of it."""

    def __init__(self, network: Any) -> None:
        self._down, self._up = [0], []
        for block in network.down_blocks:
            self._down.append(self._down[-1] + bool(block.downsamplers))
        level = self._down[-1]
        for block in network.up_blocks:
            self._up.append(level)
            level -= bool(block.upsamplers)
        if level != 0:
            raise ValueError("--parallel does not support a U-Net whose output is not of the size of its input")

    @property
    def count(self) -> int:
        """Number of resolutions."""
        return self._down[-1] + 1

    def of(self, path: str) -> int:
        """The level of the maps that the layer `path` (its name in the U-Net, or that of a part of it) is given."""
        found = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)", path)
        if found is None:
            return self.count - 1 if path.startswith("mid_block") else 0
        number, part = int(found[2]), found[3]
        if found[1] == "down_blocks":
            return self._down[number]
        return self._up[number] - (part == "upsamplers")
