"""Configurations of `UNet2DConditionModel`, cut small: the topology of the named model with a few channels.

In diffusers `attention_head_dim` is the number of heads of each level, not their dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tests.support.dits.weights import seeded

TEXT_WIDTH = 32
POOLED_WIDTH = 24
TIME_IDS_WIDTH = 8
"""Channels of each of SDXL's micro-conditions."""

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

FOUR_LEVELS = {"down_block_types": (CROSS_DOWN,) * 3 + (DOWN,), "up_block_types": (UP,) + (CROSS_UP,) * 3}
COMMON = {"cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8, "layers_per_block": 2, "sample_size": 64}

SD15 = {**COMMON, **FOUR_LEVELS, "block_out_channels": (32, 48, 64, 64), "attention_head_dim": 8}
SD2 = {**SD15, "attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True}
SDXL = {
    **COMMON,
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (32, 48, 64),
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_IDS_WIDTH,
    "projection_class_embeddings_input_dim": 6 * TIME_IDS_WIDTH + POOLED_WIDTH,
}
REFINER = {
    **SDXL,
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (32, 48, 64, 64),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (2, 4, 8, 8),
    "projection_class_embeddings_input_dim": 5 * TIME_IDS_WIDTH + POOLED_WIDTH,
}
UPSCALER = {
    **SD2,
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": (True, True, True, False),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP, UP),
}
"""SD x4: the upper levels attend to the text in both of a block's attentions."""

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1.5": SD15,
    "sd2": SD2,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpaint": {**SD15, "in_channels": 9},
    "lcm": {**SD15, "time_cond_proj_dim": 16},
    "upscaler": UPSCALER,
    "unclip": {**SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": POOLED_WIDTH},
    "kolors": {**SDXL, "encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "small-sd": {
        **COMMON,
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": (CROSS_DOWN,) * 3,
        "up_block_types": (CROSS_UP,) * 3,
        "block_out_channels": (32, 48, 64),
        "attention_head_dim": 8,
    },
    "resnet sampling": {
        **COMMON,
        "down_block_types": ("ResnetDownsampleBlock2D", CROSS_DOWN),
        "up_block_types": (CROSS_UP, "ResnetUpsampleBlock2D"),
        "block_out_channels": (32, 48),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
        "downsample_padding": 0,
    },
}
"""`small-sd` is the distilled SD1.5 without a middle block; `resnet sampling` has what rarer models have: residual
blocks that resample inside, a scale and shift from the time step, and a stride-2 convolution that pads on two sides."""


REAL: dict[str, dict[str, Any]] = {
    "real sd1.5": {
        **FOUR_LEVELS,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    "real sdxl": {
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
"""The published models, at their size."""

INIT = {"sharpness": 1.4, "norm_weight": 1.0}
"""Of random weights. With the zoo's sharper attention so many layers are chaotic: float32 is up to 1 from float64."""


def build_unet(name: str) -> UNet2DConditionModel:
    """The case's U-Net with random weights, the same each time, whose output is about 1 in size."""
    with torch.device("meta"):  # diffusers' own initialisation takes longer than all the rest at the real size
        empty = UNet2DConditionModel(**{**CONFIGS, **REAL}[name])
    unet = seeded(empty.to_empty(device="cpu"), **INIT)
    assert isinstance(unet, UNet2DConditionModel)
    return unet
