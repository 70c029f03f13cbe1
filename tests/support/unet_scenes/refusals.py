"""What patches would get wrong and the plugin must refuse by name."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline

from tests.support.unet_scenes.parts import pipeline
from tests.support.unet_scenes.scene import Scene, calling, images


def sd() -> Any:
    return pipeline(StableDiffusionPipeline)


def pag() -> Any:
    return pipeline(StableDiffusionPAGPipeline)


def with_freeu(pipe: Any) -> list[torch.Tensor]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return [images(pipe)]


def fused_projections(pipe: Any) -> list[torch.Tensor]:
    pipe.fuse_qkv_projections()
    return [images(pipe)]


def tiny(pipe: Any) -> list[torch.Tensor]:
    """Eight latent rows: one at the lowest level."""
    return [images(pipe, height=32, width=64)]


SCENES = (
    Scene("FreeU", sd, with_freeu, refused="FreeU"),
    Scene("fused projections", sd, fused_projections, refused="processor"),
    Scene("perturbed attention guidance", pag, calling(), refused="StableDiffusionPAGPipeline"),
    Scene("too few rows", sd, tiny, refused="rows"),
)
