"""Pipelines with inputs of their own: depth, a small image to enlarge, the embedding of an image, ControlNet-Union."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers import (
    ControlNetUnionModel,
    DDPMScheduler,
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.dits.weights import noise, seeded
from tests.support.unet_scenes.parts import INIT, SIZE, TEXT_WIDTH, drawn, mask, pipeline, unet
from tests.support.unet_scenes.scene import Scene, calling, images

WORDS = 7


def with_depth() -> Any:
    return pipeline(StableDiffusionDepth2ImgPipeline, unet=unet("sd1.5", in_channels=5), depth_estimator=None)


def enlarging() -> Any:
    return pipeline(StableDiffusionUpscalePipeline, unet=unet("upscaler"), low_res_scheduler=DDPMScheduler())


def eyes() -> CLIPVisionModelWithProjection:
    """An image encoder of random weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=TEXT_WIDTH)
    made = seeded(CLIPVisionModelWithProjection(config), **INIT)
    assert isinstance(made, CLIPVisionModelWithProjection)
    return made


def varied() -> Any:
    return pipeline(StableDiffusionImageVariationPipeline, image_encoder=eyes())


def unclip() -> Any:
    size = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * TEXT_WIDTH}
    parts = {
        "image_encoder": eyes(),
        "image_normalizer": StableUnCLIPImageNormalizer(TEXT_WIDTH),
        "image_noising_scheduler": DDPMScheduler(),
    }
    return pipeline(StableUnCLIPImg2ImgPipeline, unet=unet("sd1.5", **size), **parts)


def kolors(kind: Any = KolorsPipeline) -> Any:
    """Its text encoder is ChatGLM; embeddings of text are given instead."""
    return pipeline(kind, "sdxl", text_encoder=None, tokenizer=None)


def kolors_edit() -> Any:
    """diffusers' own call does not hand pooled embeddings on, so these are what encoding gives."""
    pipe, given = kolors(KolorsImg2ImgPipeline), embedded()
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    pipe.encode_prompt = lambda *args, **kwargs: tuple(given[name] for name in names)
    return pipe


def embedded() -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of a negative one."""
    given = {f"{sign}prompt_embeds": noise(1, WORDS, 2 * TEXT_WIDTH, seed=60 + len(sign)) for sign in ("", "negative_")}
    pooled = {f"{sign}pooled_prompt_embeds": noise(1, TEXT_WIDTH, seed=80 + len(sign)) for sign in ("", "negative_")}
    return {"prompt": None, **given, **pooled}


def union(kind: Any = StableDiffusionXLControlNetUnionPipeline) -> Any:
    """One network for several kinds of condition, which looks at the mean of the whole map."""
    network = unet("sdxl")
    known = signature(ControlNetUnionModel.__init__).parameters
    sizes = {name: value for name, value in network.config.items() if name in known}
    sizes |= {"num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    sizes |= {"conditioning_embedding_out_channels": (8, 16, 16)}
    made = ControlNetUnionModel(**sizes)
    return pipeline(kind, "sdxl", unet=network, controlnet=seeded(made, **INIT))


def enlarged(pipe: Any) -> list[torch.Tensor]:
    small = torch.nn.functional.interpolate(drawn(), size=(SIZE // 4, SIZE // 4))
    return [images(pipe, image=small, noise_level=20)]


def variations(pipe: Any) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [pipe(drawn()[..., :32, :32], generator=draw, num_inference_steps=3, output_type="latent").images]


SCENES = (
    Scene("depth to image", with_depth,
          calling(image=drawn(), depth_map=noise(1, SIZE, SIZE, seed=5), strength=0.7, num_inference_steps=6)),
    Scene("x4 upscaler", enlarging, enlarged),
    Scene("image variation", varied, variations),
    Scene("unCLIP img2img", unclip, calling(image_embeds=noise(1, TEXT_WIDTH, seed=9), noise_level=3)),
    Scene("Kolors", kolors, calling(**embedded())),
    Scene("Kolors img2img", kolors_edit, calling(image=drawn(), strength=0.7, num_inference_steps=6)),
    Scene("ControlNet-Union img2img", partial(union, StableDiffusionXLControlNetUnionImg2ImgPipeline),
          calling(image=drawn(), strength=0.7, num_inference_steps=6, control_image=[drawn(2)], control_mode=[1])),
    Scene("ControlNet-Union inpaint", partial(union, StableDiffusionXLControlNetUnionInpaintPipeline),
          calling(image=drawn(), mask_image=mask(), strength=0.7, num_inference_steps=6, control_image=[drawn(2)],
                  control_mode=[1])),
    Scene("ControlNet-Union", union, calling(control_image=[drawn(2)], control_mode=[1])),
    Scene("ControlNet-Union, two", union, calling(control_image=[drawn(2), drawn(3)], control_mode=[0, 2])),
)  # fmt: skip
