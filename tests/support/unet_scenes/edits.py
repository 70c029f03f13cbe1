"""Image to image, inpaint, ControlNet, T2I-Adapter, InstructPix2Pix, the refiner."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    T2IAdapter,
)

from tests.support.dits.weights import seeded
from tests.support.unet_scenes.parts import INIT, controlnet, drawn, mask, pipeline, unet
from tests.support.unet_scenes.scene import IMAGES_TOLERANCE, Scene, calling, images

CHANGED = {"image": drawn(), "strength": 0.7, "num_inference_steps": 6}
PAINTED = {"image": drawn(), "mask_image": mask(), "num_inference_steps": 6}
CONTROLLED = {"image": drawn(2)}


def edit(kind: type, case: str) -> Any:
    return lambda: pipeline(kind, case)


def controlled(kind: type, case: str, nets: int = 1) -> Any:
    """Makes a pipeline with one ControlNet, or with several that are added up."""

    def build() -> Any:
        network = unet(case)
        made = [controlnet(network, seed) for seed in range(nets)]
        return pipeline(kind, case, unet=network, controlnet=made[0] if nets == 1 else MultiControlNetModel(made))

    return build


def pooled() -> Any:
    """A ControlNet whose residuals are means over the whole image."""
    pipe = controlled(StableDiffusionControlNetPipeline, "sd1.5")()
    pipe.controlnet.register_to_config(global_pool_conditions=True)
    return pipe


def adapted(kind: type, case: str) -> Any:
    """Makes a pipeline with a T2I-Adapter."""

    def build() -> Any:
        network = unet(case)
        channels = network.config.block_out_channels
        xl = case == "sdxl"
        adapter = T2IAdapter(
            in_channels=3,
            channels=[*channels, channels[-1]][:4],
            num_res_blocks=1,
            downscale_factor=8 if xl else 4,
            adapter_type="full_adapter_xl" if xl else "full_adapter",
        )
        return pipeline(kind, case, unet=network, adapter=seeded(adapter, **INIT))

    return build


def instructed(kind: type, case: str) -> Any:
    """Makes a pipeline whose network takes noise and image as eight channels."""
    return lambda: pipeline(kind, case, unet=unet(case, in_channels=8))


def refined(pipe: Any) -> list[torch.Tensor]:
    """A refiner goes on from latents that another network has half denoised."""
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    return [images(pipe, image=latents, denoising_start=0.5, num_inference_steps=8, aesthetic_score=5.0)]


SCENES = (
    Scene("img2img", edit(StableDiffusionImg2ImgPipeline, "sd1.5"), calling(**CHANGED)),
    Scene("img2img, image", edit(StableDiffusionImg2ImgPipeline, "sd1.5"), calling(**CHANGED, output_type="pt"),
          IMAGES_TOLERANCE),
    Scene("SDXL img2img", edit(StableDiffusionXLImg2ImgPipeline, "sdxl"), calling(**CHANGED)),
    Scene("SDXL refiner", edit(StableDiffusionXLImg2ImgPipeline, "refiner"), refined),
    Scene("inpaint, 4 channels", edit(StableDiffusionInpaintPipeline, "sd1.5"), calling(**PAINTED)),
    Scene("inpaint, 9 channels", edit(StableDiffusionInpaintPipeline, "inpaint"), calling(**PAINTED)),
    Scene("SDXL inpaint", edit(StableDiffusionXLInpaintPipeline, "sdxl"), calling(**PAINTED, strength=0.8)),
    Scene("ControlNet", controlled(StableDiffusionControlNetPipeline, "sd1.5"), calling(**CONTROLLED)),
    Scene("two ControlNets", controlled(StableDiffusionControlNetPipeline, "sd1.5", 2),
          calling(image=[drawn(2), drawn(3)], controlnet_conditioning_scale=[0.7, 0.4])),
    Scene("two ControlNets, uneven", controlled(StableDiffusionControlNetPipeline, "sd1.5", 2),
          calling(image=[drawn(2), drawn(3)], height=104, width=72, num_images_per_prompt=2)),
    Scene("ControlNet, guess mode", controlled(StableDiffusionControlNetPipeline, "sd1.5"),
          calling(**CONTROLLED, guess_mode=True)),
    Scene("ControlNet, guess mode of two", controlled(StableDiffusionControlNetPipeline, "sd1.5", 2),
          calling(image=[drawn(2), drawn(3)], guess_mode=True, num_images_per_prompt=2, height=104)),
    Scene("ControlNet, pooled", pooled, calling(**CONTROLLED)),
    Scene("ControlNet, later", controlled(StableDiffusionControlNetPipeline, "sd1.5"),
          calling(**CONTROLLED, control_guidance_start=0.4)),
    Scene("ControlNet, only at first", controlled(StableDiffusionControlNetPipeline, "sd1.5"),
          calling(**CONTROLLED, control_guidance_end=0.5)),
    Scene("SDXL ControlNet", controlled(StableDiffusionXLControlNetPipeline, "sdxl"), calling(**CONTROLLED)),
    Scene("ControlNet img2img", controlled(StableDiffusionControlNetImg2ImgPipeline, "sd1.5"),
          calling(**CHANGED, control_image=drawn(2))),
    Scene("ControlNet inpaint", controlled(StableDiffusionControlNetInpaintPipeline, "sd1.5"),
          calling(**PAINTED, control_image=drawn(2))),
    Scene("SDXL ControlNet img2img", controlled(StableDiffusionXLControlNetImg2ImgPipeline, "sdxl"),
          calling(**CHANGED, control_image=drawn(2))),
    Scene("T2I-Adapter", adapted(StableDiffusionAdapterPipeline, "sd1.5"), calling(image=drawn(2))),
    Scene("SDXL T2I-Adapter", adapted(StableDiffusionXLAdapterPipeline, "sdxl"), calling(image=drawn(2))),
    Scene("InstructPix2Pix", instructed(StableDiffusionInstructPix2PixPipeline, "sd1.5"), calling(image=drawn())),
    Scene("SDXL InstructPix2Pix", instructed(StableDiffusionXLInstructPix2PixPipeline, "sdxl"),
          calling(image=drawn())),
    Scene("SDXL ControlNet inpaint", controlled(StableDiffusionXLControlNetInpaintPipeline, "sdxl"),
          calling(**PAINTED, control_image=drawn(2), strength=0.8)),
)  # fmt: skip
