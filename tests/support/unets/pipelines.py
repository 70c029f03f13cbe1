"""The least pipeline that holds a U-Net: what `otil_xdit.parallelize` takes."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)


def pipeline_around(unet: UNet2DConditionModel) -> DiffusionPipeline:
    """A pipeline with `unet` and a scheduler, and nothing that encodes or decodes."""
    # clip_sample off: saturated values would hide differences. steps_offset 1: else the pipeline warns.
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": scheduler}
    if unet.config.addition_embed_type == "text_time":
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
