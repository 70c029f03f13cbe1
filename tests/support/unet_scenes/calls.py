"""Text to image: arguments of the call, schedulers, callbacks, settings of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import distributed as dist

from otil_xdit.catalog.schedulers import make_scheduler
from tests.support.unet_scenes.parts import drawn, pipeline, scheduler
from tests.support.unet_scenes.scene import IMAGES_TOLERANCE, OTHER_PROMPT, PROMPT, Scene, calling, images

SCHEDULERS = (
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)


def sd(case: str = "sd1.5") -> Any:
    return pipeline(StableDiffusionPipeline, case)


def sdxl() -> Any:
    return pipeline(StableDiffusionXLPipeline, "sdxl")


def sd2() -> Any:
    return sd("sd2")


def lcm() -> Any:
    made = LCMScheduler(clip_sample=False, prediction_type="v_prediction")
    return pipeline(LatentConsistencyModelPipeline, "lcm", scheduler=made)


def with_scheduler(kind: type) -> Callable[[Any], list[torch.Tensor]]:
    """A call with another scheduler, chosen after the pipeline was parallelised, as people do.

    Of four steps: PNDM's first ones take as many.
    """

    def run(pipe: Any) -> list[torch.Tensor]:
        pipe.scheduler = kind.from_config(scheduler().config)
        return [images(pipe, num_inference_steps=4)]

    return run


def drawing(name: str) -> Callable[[Any], list[torch.Tensor]]:
    """Calls with a scheduler that adds noise at every step: with a generator, and without one from torch's own."""

    def run(pipe: Any) -> list[torch.Tensor]:
        pipe.scheduler = make_scheduler(name, scheduler())
        return [images(pipe), *without_generator(pipe)]

    return run


def sizes(pipe: Any) -> list[torch.Tensor]:
    """One pipeline, several sizes and batches: nothing of one image may reach the next."""
    return [
        images(pipe),
        images(pipe, height=136, width=72),
        images(pipe, prompt=[PROMPT, OTHER_PROMPT], height=72, width=96),
        images(pipe, guidance_scale=1.0, height=104, width=104),
        images(pipe),
    ]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def without_generator(pipe: Any) -> list[torch.Tensor]:
    """Ranks with different seeds must still work on one image: the first rank's."""
    torch.manual_seed(40 + dist.get_rank())
    return [images(pipe, generator=None), images(pipe, generator=None, eta=1.0)]


def changing_prompt(pipe: Any) -> list[torch.Tensor]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(1) * 0.5
        return tensors

    return [images(pipe, callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=["prompt_embeds"])]


def prompt_in_place(pipe: Any) -> list[torch.Tensor]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["prompt_embeds"].mul_(-0.8)
        return {}

    return [images(pipe, callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=["prompt_embeds"])]


def changing_latents(pipe: Any) -> list[torch.Tensor]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"].flip(-2)}

    return [images(pipe, callback_on_step_end=on_step_end)]


def without_guidance_midway(pipe: Any) -> list[torch.Tensor]:
    """Guidance that ends halfway: the batch shrinks within a generation."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    return [images(pipe, callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=["prompt_embeds"])]


def interrupted(pipe: Any) -> list[torch.Tensor]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    return [images(pipe, callback_on_step_end=on_step_end), images(pipe)]


def after_an_error(pipe: Any) -> list[torch.Tensor]:
    """A callback that fails on every rank must not spoil the next image."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("stop")

    try:
        images(pipe, callback_on_step_end=on_step_end)
    except KeyError:
        return [images(pipe)]
    raise AssertionError("the callback's error was swallowed")


def shared_components(pipe: Any) -> list[torch.Tensor]:
    """Another pipeline made of the same parts, which nobody parallelised, and the first one again."""
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return [images(other, image=drawn(), strength=0.7), images(pipe)]


def network_alone(pipe: Any) -> list[torch.Tensor]:
    """The U-Net outside a generation, between two of them."""
    text = torch.ones(2, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        alone = pipe.unet(torch.ones(2, 4, 24, 16), 3, encoder_hidden_states=text).sample
    return [images(pipe), alone, images(pipe)]


def own_timesteps(pipe: Any) -> list[torch.Tensor]:
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler().config)
    return [images(pipe, timesteps=[900, 500, 60])]


def saving_memory(pipe: Any) -> list[torch.Tensor]:
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    return [images(pipe, height=136, width=136, output_type="pt", num_images_per_prompt=2)]


def in_double(pipe: Any) -> list[torch.Tensor]:
    pipe.to(torch.float64)
    made = [images(pipe)]
    pipe.to(torch.float32)  # the text encoders and the VAE serve the next scenes
    return made


SCENES = (
    Scene("SD1.5", sd, calling()),
    Scene("SD1.5, image", sd, calling(output_type="pt"), IMAGES_TOLERANCE),
    Scene("SD2", sd2, calling()),
    Scene("SDXL", sdxl, calling()),
    Scene("SDXL, image", sdxl, calling(output_type="pt"), IMAGES_TOLERANCE),
    Scene("LCM", lcm, calling(guidance_scale=8.0)),
    Scene("two prompts", sd, calling(prompt=[PROMPT, OTHER_PROMPT], negative_prompt=["dots", "stripes"])),
    Scene("two images a prompt", sdxl, calling(num_images_per_prompt=2, negative_prompt="dots")),
    Scene("three images", sd, calling(num_images_per_prompt=3, guidance_scale=1.0)),
    Scene("generator for each", sd, calling(num_images_per_prompt=2, generator=generators, eta=0.5)),
    Scene("no guidance", sd, calling(guidance_scale=1.0)),
    Scene("SDXL, no guidance", sdxl, calling(guidance_scale=1.0)),
    Scene("guidance rescaled", sdxl, calling(guidance_rescale=0.7, clip_skip=1)),
    Scene("micro-conditions", sdxl, calling(original_size=(64, 96), crops_coords_top_left=(8, 0))),
    Scene("denoising_end", sdxl, calling(denoising_end=0.6, num_inference_steps=6)),
    Scene("own time steps", sdxl, own_timesteps),
    Scene("no generator", sd, without_generator),
    Scene("several sizes", sd, sizes),
    Scene("SDXL, several sizes", sdxl, sizes),
    Scene("callback: other prompt", sd, changing_prompt),
    Scene("callback: prompt in place", sdxl, prompt_in_place),
    Scene("callback: latents", sd, changing_latents),
    Scene("callback: guidance ends", sd, without_guidance_midway),
    Scene("callback: interrupt", sd, interrupted),
    Scene("callback: error", sd, after_an_error),
    Scene("shared components", sd, shared_components),
    Scene("U-Net alone", sd, network_alone),
    Scene("slicing and tiling", sd, saving_memory, IMAGES_TOLERANCE),
    Scene("float64", sd, in_double),
    *(Scene(kind.__name__, sd, with_scheduler(kind)) for kind in SCHEDULERS),
    *(Scene(f"noise of {name}", sd, drawing(name)) for name in ("dpm-solver-sde", "euler-a")),
)
